"""Studies: many trainings and evaluations that together make a table or a figure.

A study is a list of cells. Each is a few commands, complete when its results JSON exists. Every
study has three verbs:

    plan    lists the cells, one command each, with the cells that must be complete before: for a
            Slurm array or several machines
    run     runs the missing cells here, one after the other; the same command continues after an
            interruption
    draw    makes tables and figures from the results JSON files alone; a missing result is drawn
            as missing
"""

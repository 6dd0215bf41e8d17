"""Joint-embedding tasks: one batch by hand, eight devices, exact resumption with teacher and
centre, evaluation, embedding, warm starts, a collapse that is said, wrong recipes."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.slices import open_source
from ctssl_jax.evaluation import measure
from ctssl_jax.inference.pretrained import load
from ctssl_jax.models.joint_embedding import (
    JointEmbedding,
    JointEmbeddingConfig,
    flops_per_view,
)
from ctssl_jax.models.layers import leaky_relu
from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.probes.encoders import trained_encoder
from ctssl_jax.runs import reports
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks import joint_embedding
from ctssl_jax.tasks.interface import step_flops
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import health
from ctssl_jax.training.step import make_program, train_step
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.training_runs import (
    ask_to_stop_at,
    assert_same_state,
    begun_state,
    losses,
    numbers,
    randomised,
    save_untrained,
    saved_state,
    step_on_one_and_eight_devices,
    tiny_recipe,
    train_on,
)

TASKS = ("lejepa", "visreg", "vicreg", "simclr", "dino")


def learning(dataset, task, /, **overrides):
    short = {"num_steps": 16, "log_every": 4, "eval_every": 8, "model.depth": 0}
    if task in ("lejepa", "dino"):  # the others show that there may be none
        short["views.num_local"] = 1
    elif task == "visreg":
        short |= {"views.num_local": 0, "batch_size": 16}
    return tiny_recipe(dataset, task, **(short | overrides))


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """Runs without interruption, one a task."""
    finished = {}

    def run(task):
        if task not in finished:
            finished[task] = tmp_path_factory.mktemp(task) / "run"
            assert train_on(learning(tiny_dataset, task), finished[task])
        return finished[task]

    return run


@pytest.mark.parametrize("task", TASKS)
def test_interrupted_run_equals_straight_run(task, straight, tiny_dataset, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 6)  # between reports, past the frozen prototypes
        assert not train_on(learning(tiny_dataset, task), workdir)
    assert train_on(learning(tiny_dataset, task), workdir)
    assert_same_state(workdir, straight(task))
    assert numbers(workdir) == numbers(straight(task))


@pytest.mark.parametrize("task", TASKS)
def test_a_small_run_learns_and_is_healthy(task, straight):
    reported = losses(straight(task))
    assert len(reported) == 4 and np.isfinite(reported).all()
    if task != "dino":  # its targets sharpen as it learns
        assert reported[-1] < reported[0]
    (*_, last) = reports.read_reports(straight(task), "validation")
    assert {
        "effective_rank",
        "pairwise_cosine",
        "relative_sd",
        "uniformity",
        "alignment",
        "neighbour_recall",
    } <= set(last)
    assert health.warnings(learning("data", task), last | {"embedding_dim": 4}) == []


def test_frozen_prototypes_are_no_fault(tiny_dataset, tmp_path, capsys):
    frozen = {"teacher.frozen_steps": 5, "num_steps": 8, "eval_every": 4}
    assert train_on(learning(tiny_dataset, "dino", **frozen), tmp_path / "run")
    assert reports.read_reports(tmp_path / "run", "gradient_norm")[0]["prototypes"] == 0
    assert "no gradient reaches" not in capsys.readouterr().out


def test_the_teacher_and_its_centre_are_in_the_checkpoint(straight):
    state = saved_state(straight("dino"))
    student = [name for name in state if name.startswith("params/") and "optimizer" not in name]
    for name in student:
        teacher = name.replace("params/", "variables/teacher/")
        assert state[teacher].shape == state[name].shape
    moved = [
        np.abs(state[name.replace("params/", "variables/teacher/")] - state[name]).max()
        for name in student
        if name.endswith("kernel")
    ]
    assert min(moved) > 0  # it follows, and has not arrived
    assert np.abs(state["variables/centre"]).max() > 0 and state["variables/steps"] == 16
    assert not [name for name in state if "optimizer" in name and "teacher" in name]


def test_one_batch_of_lejepa_by_hand(tiny_dataset):
    config = learning(tiny_dataset, "lejepa")
    task = get_task("lejepa")
    source = open_source(
        Dataset.open(tiny_dataset), "train", (0,), task.offsets(config), task.targets(config)
    )
    batch = next(training_batches(source, 8, 0))
    model = task.build(config, nnx.Rngs(params=0))
    keys = jax.random.split(jax.random.key(1), 8)

    @nnx.jit
    def apply(model):
        return task.apply(model, batch, keys, None, config, train=False)

    output = apply(model)
    shown = output.pictures
    assert shown["global view 1"].shape == (8, 16, 16, 1)
    assert shown["local view 1"].shape == (8, 8, 8, 1)
    np.testing.assert_allclose(shown["input"], batch["images"][:, 1] / np.float32(255), atol=1e-6)
    whole = model.encoder(jnp.asarray(shown["input"]), train=False)
    np.testing.assert_allclose(output.embedding, np.mean(whole, axis=(1, 2)), atol=1e-5)
    scores = output.scores
    expected = 0.95 * scores["invariance"] + 0.05 * scores["sigreg"]
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
    assert np.ptp(scores["sigreg"]) == 0 and np.ptp(scores["invariance"]) > 0
    views = {0: shown["global view 1"], 1: shown["global view 2"]}
    features = np.stack(
        [np.mean(model.encoder(jnp.asarray(v), train=False), axis=(1, 2)) for v in views.values()]
    )
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    distance = np.square(unit[0] - unit[1]).sum(-1)
    np.testing.assert_allclose(scores["alignment"], distance, rtol=1e-3, atol=1e-6)


def test_dropout_is_of_the_student_alone(tiny_dataset):
    config = learning(tiny_dataset, "dino", model__depth=1, model__drop_rate=0.5)
    program = make_program(config, get_task("dino"), 1, make_mesh(jax.devices()[:1]))
    images = np.random.default_rng(0).integers(0, 255, (8, 3, 16, 16, 1), np.uint8)
    batch = {"images": images, "record_index": np.arange(8), "weight": np.ones(8, np.float32)}
    before = program.initial_state()
    mean = "teacher/encoder/blocks/0/norm/mean"  # after dropout, if there is any
    of_steps = []

    @jax.jit
    def step(state, model_key):
        definition = dataclasses.replace(program.definition, model_key=model_key)
        return train_step(definition, state, batch)

    for model_key in (0, 1):
        after = step(before, jax.random.key(model_key))
        assert np.isfinite(after.sums["loss"]) and after.nonfinite_step < 0
        of_steps.append(after)
    one, two = (flatten(after.variables) for after in of_steps)
    assert np.abs(one[mean]).max() > 0  # statistics of the batch
    np.testing.assert_array_equal(one[mean], two[mean])
    student = mean.removeprefix("teacher/")
    assert not np.array_equal(one[student], two[student])


def test_sigreg_of_a_step_does_not_weaken_with_microbatches(tiny_dataset):
    """The same microbatch of 8 items, of a step of 8 items and of one of 16."""
    task = get_task("lejepa")
    images = np.random.default_rng(0).integers(0, 255, (8, 3, 16, 16, 1), np.uint8)
    keys, found = jax.random.split(jax.random.key(1), 8), {}
    for microbatches in (1, 2):
        sizes = {"batch_size": 8 * microbatches, "microbatches": microbatches}
        config = learning(tiny_dataset, "lejepa", **sizes)
        model = task.build(config, nnx.Rngs(params=0))
        for train in (False, True):

            @nnx.jit
            def apply(model, config=config, train=train):
                return task.apply(model, {"images": images}, keys, None, config, train=train)

            found[microbatches, train] = float(apply(model).scores["sigreg"][0])
    assert found[2, True] == pytest.approx(2 * found[1, True], rel=1e-5)
    assert found[2, False] == pytest.approx(found[1, False], rel=1e-5)


def test_a_step_on_two_groups_of_devices_is_that_of_one_device(tiny_dataset):
    """With a teacher and its centre."""
    images = np.random.default_rng(0).integers(0, 255, (8, 3, 16, 16, 1), np.uint8)
    numbers, weight = np.arange(8, dtype=np.int32), np.ones(8, np.float32)
    batch = {"images": images, "record_index": numbers, "weight": weight}
    on_groups = {"fsdp_devices": 4}
    (one, variables), (eight, others) = step_on_one_and_eight_devices(
        learning(tiny_dataset, "dino"), batch, on_groups
    )
    for name in ("loss", "alignment"):
        assert float(eight[name]) == pytest.approx(float(one[name]), rel=1e-4), name
    for name, norm in one["layer_gradient_norms"].items():
        assert float(eight["layer_gradient_norms"][name]) == pytest.approx(norm, rel=2e-3), name
    for name, value in variables.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_directions_depend_on_the_step_and_the_seed_alone(tiny_dataset):
    """Of neither the projections nor the place: all devices and a resumed run draw the same."""

    def drawn(seed, step, shown=0, train=True):
        found = []

        def terms(z, directions, number):
            found.append(np.asarray(directions))
            return {"term": jnp.zeros(())}

        z = jax.random.normal(jax.random.key(shown), (8, 3, 4))
        given = joint_embedding.Projections(
            z, SimpleNamespace(steps=jnp.asarray(step)), None, {}, train
        )
        joint_embedding._with_regulariser(terms, given, learning(tiny_dataset, "lejepa", seed=seed))
        return found[0]

    one = drawn(0, 1)
    assert one.shape == (16, 4)
    np.testing.assert_array_equal(one, drawn(0, 1, shown=1))
    assert not np.allclose(one, drawn(0, 0)) and not np.allclose(one, drawn(1, 1))
    np.testing.assert_array_equal(drawn(0, 0), drawn(0, 1, train=False))  # of every evaluation


def test_evaluation_and_embedding_of_a_run(straight, tiny_dataset, tmp_path):
    result = measure.evaluate(
        straight("lejepa"), tiny_dataset, "test", tmp_path / "r.json", batch_size=8
    )
    assert list(result["metrics"]) == ["invariance", "sigreg", "alignment"]
    assert result["embedding"]["embedding_dim"] == 4 and result["num_slices"] == 24
    assert json.loads((tmp_path / "r.json").read_text()) == result
    images = np.stack([r["image"] for r in Dataset.open(tiny_dataset).source("test")])[:6]
    model = load(straight("lejepa"))
    latents = model.latents(images)
    np.testing.assert_allclose(model.embed(images).slices, latents.mean((1, 2)), atol=1e-5)


def test_slices_are_not_evaluated_one_at_a_time(straight, tiny_dataset, tmp_path, monkeypatch):
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(measure, "make_mesh", lambda: mesh)
    with pytest.raises(InputError, match=r"^one slice at a time: the task vicreg compares"):
        measure.evaluate(
            straight("vicreg"), tiny_dataset, "test", tmp_path / "r.json", batch_size=1
        )
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("task", ["masked_region", "dino"])
def test_other_runs_begin_with_its_encoder(task, straight, tiny_dataset, tmp_path):
    config = tiny_recipe(
        tiny_dataset,
        task,
        num_steps=3,  # prototypes are frozen in two
        model__depth=0,
        eval_every=3,
        init_from=str(straight("lejepa")),
        init_scope="encoder",
    )
    assert train_on(config, tmp_path / "run")
    moved = json.loads((tmp_path / "run" / "transplant.json").read_text())["moved"]
    assert moved and all(name.split("/")[1] == "encoder" for name in moved)


def test_a_whole_model_moves_without_its_steps(straight, tiny_dataset, tmp_path):
    """So that the momentum of the teacher begins anew."""
    donor = saved_state(straight("dino"))
    fields = {"init_from": str(straight("dino")), "init_checkpoint": "last", "init_scope": "model"}
    assert train_on(learning(tiny_dataset, "dino", **fields), tmp_path / "run")
    names = json.loads((tmp_path / "run" / "transplant.json").read_text())
    assert names["initialised"] == ["variables/steps"] == names["left_behind"]
    begun, after = begun_state(tmp_path / "run"), saved_state(tmp_path / "run")
    assert begun["variables/steps"] == 0 and after["variables/steps"] == 16
    for name in names["moved"]:
        np.testing.assert_array_equal(begun[name], donor[name])
    teacher = "variables/teacher/encoder/stem/conv/kernel"
    assert teacher in names["moved"] and not np.array_equal(after[teacher], donor[teacher])


# Weights that decay faster than they learn leave an encoder that gives one feature for all slices.
CONSTANT = {"weight_decay": 30.0, "num_steps": 20}


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        # agreement alone: without the regulariser all features become one
        ("lejepa", {"regulariser.weight": 0.0, "num_steps": 60}),
        ("visreg", CONSTANT),
        ("vicreg", CONSTANT),
        ("simclr", CONSTANT),
        # no centring, and a teacher that is sure: few prototypes win
        ("dino", {"teacher.centre_momentum": 1.0, "teacher.temperature": (0.02, 0.02),
                  "teacher.momentum": 0.9, "num_steps": 40}),
    ],
)  # fmt: skip
def test_a_collapse_is_said(task, settings, tiny_dataset, tmp_path, capsys):
    settings = {"learning_rate": 0.03, "eval_every": settings["num_steps"]} | settings
    if task != "lejepa":
        settings["views.num_local"] = 0
    config = learning(tiny_dataset, task, **settings)
    assert train_on(config, tmp_path / "run")
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "the encoder has collapsed" in line]
    assert "mean cosine" in line


def test_bfloat16_is_close_to_float32(straight, tiny_dataset, tmp_path):
    """With a teacher; weights, statistics, views and loss are float32."""
    config = learning(tiny_dataset, "dino", dtype="bfloat16")
    assert train_on(config, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(straight("dino")), rtol=0.05)


def test_flops_count_views_and_the_teacher_once(tiny_dataset):
    lejepa, dino = (learning(tiny_dataset, task) for task in ("lejepa", "dino"))
    of_lejepa, of_dino = get_task("lejepa"), get_task("dino")
    assert of_lejepa.teacher_flops(lejepa) == 0
    assert step_flops(of_lejepa, lejepa) == 3 * of_lejepa.flops(lejepa)
    teacher = of_dino.teacher_flops(dino)
    assert step_flops(of_dino, dino) == 3 * (of_dino.flops(dino) - teacher) + teacher
    fewer = learning(tiny_dataset, "lejepa", views__num_local=0)
    assert of_lejepa.flops(fewer) < of_lejepa.flops(lejepa)


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        ("lejepa", "views.global_size", 32, "config.views.global_size=32: must be a multiple of 4"),
        ("lejepa", "regulariser.weight", 1.5, "config.regulariser.weight=1.5: must be 0 or more"),
        ("visreg", "regulariser.weight", 0.29, "below 0.3; set --config.regulariser.weight=0.7"),
        ("simclr", "views.num_global", 1, "1 global and 0 local views of an item; two global one"),
        ("simclr", "temperature", 0.0, "config.temperature=0.0: must be above 0"),
        ("dino", "teacher.temperature", (0.07,), "(0.07,): must hold the first and the last one"),
        ("dino", "teacher.frozen_steps", 12, "in config.num_steps=12; set --config.teacher.frozen"),
        ("vicreg", "model.num_prototypes", 8, "num_prototypes=8: must be 0, since this task has"),
        ("dino", "model.num_prototypes", 0, "config.model.num_prototypes=0: must be 1 or more"),
        ("lejepa", "best_by", "invariance", "config.best_by='invariance': choose one of"),
        ("lejepa", "model.neck", "pool", "config.model.neck='pool': choose one of none, attention"),
        ("lejepa", "model.pooled", "mean", "config.model.pooled='mean': choose one of latents"),
        ("vicreg", "microbatches", 8, "in 8 microbatches: the items of a microbatch are compared"),
        ("visreg", "microbatches", 4, "other; give 4 or more a microbatch"),
        ("lejepa", "microbatches", 4, "other; give 4 or more a microbatch"),
        ("lejepa", "views.local_area", (0.5, 0.1), "config.views.local_area=(0.5, 0.1): must ho"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(task, field, value, message, tiny_dataset, tmp_path):
    config = tiny_recipe(tiny_dataset, task)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as raised:
        train_on(config, tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pooled", "neck", "formats"),
    [
        ("latents", "none", ("torch", "onnx")),
        ("map", "attention", ("torch", "onnx")),
        ("both", "none", ("torch",)),
        ("both", "stages", ("torch",)),
    ],
)
def test_an_export_gives_the_same_embedding(pooled, neck, formats, tiny_dataset, tmp_path):
    """Pooling and neck travel with the manifest; projector, teacher and centre do not."""
    torch = pytest.importorskip("torch")
    from ctssl_jax.release.exporting import export
    from ctssl_jax.torch_bridge import ctssl_torch

    config = learning(tiny_dataset, "dino", model__pooled=pooled, model__neck=neck)
    save_untrained(config, tmp_path / "run")
    manifest = export(tmp_path / "run", tmp_path / "model", formats, "CC0-1.0")
    assert manifest["architecture"] == "JointEmbedding" and manifest["model"]["pooled"] == pooled
    assert manifest["model"]["neck"] == neck
    twin = ctssl_torch.load(tmp_path / "model")
    parts = {name.split(".")[0] for name in twin.state_dict()}
    assert parts == ({"encoder"} if neck == "none" else {"encoder", "neck"})
    images = np.stack([r["image"] for r in Dataset.open(tiny_dataset).source("test")])[:4]
    here = load(tmp_path / "run").embed(images).slices
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert here.shape == (4, {"latents": 4, "map": 8, "both": 12}[pooled])
    np.testing.assert_allclose(twin.embed(given), here, atol=1e-5)
    run = Run.open(tmp_path / "run")
    probed = trained_encoder(run.config, get_task("dino"), run, 2, regions=1)
    _, features = probed.encode(probed.state, images.astype(np.float32) / 255)
    np.testing.assert_allclose(features, here, atol=1e-5)  # probes read the same feature
    if "onnx" in formats:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
        (embedding,) = session.run(["embedding"], {"images": given.numpy()})
        np.testing.assert_allclose(embedding, here, atol=1e-5)


@pytest.mark.parametrize("neck", ["attention", "stages"])
def test_a_neck_is_a_mean_over_what_it_weighs_or_sees(neck):
    """By hand, and nothing of it is in the encoder."""
    config = JointEmbeddingConfig(hidden=(4, 8), depth=0, embedding_dim=4, pooled="both", neck=neck)
    model = randomised(JointEmbedding(config, rngs=nnx.Rngs(params=0)))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 16, 16, 1)), jnp.float32)
    features = model.encoder.trunk(model.encoder.compress(images, train=False)[1], train=False)
    latents = model.encoder.to_latents(features, train=False)
    both = np.concatenate([features, latents], axis=-1)
    if neck == "attention":
        scores = both.reshape(2, 16, 12) @ np.asarray(model.neck.attention.kernel[0, 0])
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        expected = (weights * both.reshape(2, 16, 12)).sum(axis=1)
    else:
        seen = jnp.asarray(both)
        for stage in model.neck.stages:
            seen = leaky_relu(stage(seen, train=False))
        assert seen.shape == (2, 1, 1, 12)
        expected = np.mean(seen, axis=(1, 2))
    np.testing.assert_allclose(model(images, train=False).embedding, expected, atol=1e-5)
    none = flops_per_view(dataclasses.replace(config, neck="none"), 16)
    more = {"attention": 2 * 16 * 12 * 12, "stages": 2 * 9 * 12 * 12 * (4 + 1)}[neck]
    assert flops_per_view(config, 16) == none + more

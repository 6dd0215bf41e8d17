"""A preparation: plan, convert, assemble."""

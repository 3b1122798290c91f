"""Everything around the three scripts: the embedded world, graders, baselines, studies and their results."""

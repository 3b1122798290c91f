"""The paper in miniature: methods x worlds x seeds (`reproduce`), their tables and pictures, and the main job
over seeds and in seconds."""

"""Launch lines for real models, and the conversion of reward models that older versions saved."""

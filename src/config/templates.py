"""Names of what stands around questions and answers."""

TEMPLATE_NAMES = ("user", "question", "input")
THINK, NO_THINK = "think", "no-think"
"""Templates of reasoning models: answers begin with their reasoning, or with the sign that there is none."""
CHAT_TEMPLATE_NAMES = (*TEMPLATE_NAMES, THINK, NO_THINK)
TEXT = "text"
"""Instead of the name of a template: none."""
MIXED = "mixed"
"""Instead of the name of one template: all of them, drawn."""

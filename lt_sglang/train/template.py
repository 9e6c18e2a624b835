"""Chat templates with generation marks, so that the loss can be on answers alone.

``{% generation %}`` in a template says which tokens of a conversation the model writes. Few published
templates have the marks: TRL knows marked versions of many, and the demonstration model's is marked here.
"""

from __future__ import annotations

from typing import Any

from lt_sglang.errors import LightTransferError

# The loop of ChatML as SmolLM2 and others write it, and the same with marks: role and content of an answer,
# and # the token that ends it, are the model's; the line break behind it is not.
_CHATML = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_CHATML_MARKED = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}"
    "{% else %}" + _CHATML + "{% endif %}"
)


def marked_template(tokenizer: Any) -> str:
    """The tokenizer's chat template with generation marks; raises LightTransferError if none is known.

    Rendered text is the same as without marks.
    """
    template = tokenizer.chat_template
    if not template:
        raise LightTransferError(
            "chat_template: the tokenizer has none, so chat messages cannot be written as the model expects; "
            "give samples with prompt and completion"
        )
    if isinstance(template, dict):
        template = template["default"]
    if "{% generation %}" in template or "{%- generation" in template:
        return str(template)
    if _CHATML in template:
        return str(template.replace(_CHATML, _CHATML_MARKED))
    from trl.chat_template_utils import get_training_chat_template

    try:
        known = get_training_chat_template(tokenizer)
    except ValueError:
        known = None
    if known is None:
        raise LightTransferError(
            "chat_template: has no generation marks, so where answers begin and end is not known; put "
            "{% generation %} and {% endgeneration %} around the answer in the tokenizer's template, give "
            "samples with prompt and completion, or train on everything (--loss-on all)"
        )
    return str(known)

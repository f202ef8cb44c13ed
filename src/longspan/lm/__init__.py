"""`longspan.lm`: a transformer to train from scratch, whose position scheme is one setting of its configuration.

    from longspan.lm import LongspanConfig, LongspanForCausalLM
    model = LongspanForCausalLM(LongspanConfig(position="kerple", max_position_embeddings=512))

Importing this registers it with transformers' auto classes under the model type `longspan`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from longspan.lm.configuration import LongspanConfig
from longspan.lm.encoder_decoder import LongspanForConditionalGeneration
from longspan.lm.modeling import (
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
    LongspanModel,
)

__all__ = [
    "LongspanConfig",
    "LongspanForCausalLM",
    "LongspanForConditionalGeneration",
    "LongspanForMaskedLM",
    "LongspanForSequenceClassification",
    "LongspanModel",
]

AutoConfig.register(LongspanConfig.model_type, LongspanConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, LongspanModel),
    (AutoModelForCausalLM, LongspanForCausalLM),
    (AutoModelForMaskedLM, LongspanForMaskedLM),
    (AutoModelForSequenceClassification, LongspanForSequenceClassification),
    (AutoModelForSeq2SeqLM, LongspanForConditionalGeneration),
):
    _auto.register(LongspanConfig, _model, exist_ok=True)

"""The pretraining systems by name, known to transformers' Auto classes as soon as this package is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from acoustic.models.audio_albert import (
    AudioAlbertForPreTraining,
    AudioAlbertModel,
    AudioAlbertPreTrainedModel,
)
from acoustic.models.code_bert import CodeBertForPreTraining, CodeBertModel, CodeBertPreTrainedModel
from acoustic.models.cpc import CPCForPreTraining, CPCModel, CPCPreTrainedModel
from acoustic.models.heads import make_heads, register_heads
from acoustic.models.mockingjay import MockingjayForPreTraining, MockingjayModel, MockingjayPreTrainedModel
from acoustic.models.vq_wav2vec import VQWav2VecForPreTraining, VQWav2VecModel, VQWav2VecPreTrainedModel
from acoustic.models.wav2vec import Wav2VecForPreTraining, Wav2VecModel, Wav2VecPreTrainedModel
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining

# What transformers has no classes for: (base class, encoder, objective).
OURS = (
    (Wav2VecPreTrainedModel, Wav2VecModel, Wav2VecForPreTraining),
    (VQWav2VecPreTrainedModel, VQWav2VecModel, VQWav2VecForPreTraining),
    (CodeBertPreTrainedModel, CodeBertModel, CodeBertForPreTraining),
    (CPCPreTrainedModel, CPCModel, CPCForPreTraining),
    (MockingjayPreTrainedModel, MockingjayModel, MockingjayForPreTraining),
    (AudioAlbertPreTrainedModel, AudioAlbertModel, AudioAlbertForPreTraining),
)
OBJECTIVES = {
    "wav2vec2": Wav2Vec2ForPreTraining,
    **{base.config_class.model_type: objective for base, _, objective in OURS},
}


def register() -> None:
    for base, encoder, objective in OURS:
        config_class = base.config_class
        AutoConfig.register(config_class.model_type, config_class)
        AutoModel.register(config_class, encoder)
        AutoModelForPreTraining.register(config_class, objective)
        register_heads(config_class, make_heads(base, encoder, config_class))


register()

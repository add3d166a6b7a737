"""The two reward models at toy size: PickScore's architecture (taste) and ImageReward's (judge), from transformers' own classes.

They are saved as plain folders; the project's runtime loaders (``didr_core.rewards``) read them back. Pixels come in [0, 1] at 32x32 and
are normalised with CLIP's mean and standard deviation.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from examples.tiny_world.networks import IMAGE, MAX_TOKENS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTHS = (64, 32, 1)


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """[B, 3, 32, 32] in [0, 1] to CLIP's normalised units."""
    mean = pictures.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)
    return (pictures - mean) / pictures.new_tensor(CLIP_STD).view(1, 3, 1, 1)


def _text(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """What both text towers' configs share: 3 x 64, the tokenizer's ids."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return ids | {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
    }


VISION = {"num_attention_heads": 4, "image_size": IMAGE, "patch_size": 4, "hidden_act": "gelu"}


def build_taste(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel: text 3 x 64, vision 4 x 80 with patches of 4; score = exp(logit_scale) * cosine."""
    config = CLIPConfig(
        text_config=_text(tokenizer) | {"hidden_act": "gelu"},
        vision_config=VISION | {"hidden_size": 80, "intermediate_size": 192, "num_hidden_layers": 4},
        projection_dim=64,
        logit_scale_init_value=2.3,
    )
    return CLIPModel(config)


def taste_features(model: CLIPModel, pictures: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of pictures [B, 3, 32, 32] in [0, 1] and of ids [N, tokens]."""
    image = model.visual_projection(model.vision_model(normalise(pictures)).pooler_output)
    text = model.text_projection(model.text_model(ids).pooler_output)
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)


def taste_scores(
    model: CLIPModel, pictures: torch.Tensor, ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """PickScore's score [B] of pictures [B, 3, 32, 32] in [0, 1] for ids [B, tokens]."""
    image, text = taste_features(model, pictures, ids)
    return model.logit_scale.exp() * (image * text).sum(-1)


def taste_matrix(model: CLIPModel, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The score [B, N] of every picture for every caption."""
    image, text = taste_features(model, pictures, ids)
    return model.logit_scale.exp() * image @ text.T


class Judge(torch.nn.Module):
    """BLIP as ImageReward uses it: vision tokens, a text tower that attends to them, an MLP head on the text's first token."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        vision = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "layer_norm_eps": 1e-6}
        self.vision = BlipVisionModel(BlipVisionConfig(**VISION, **vision))
        told = BlipTextConfig(
            **_text(tokenizer),
            encoder_hidden_size=64,
            sep_token_id=tokenizer.eos_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,  # creates the cross-attention; the forward pass stays bidirectional
        )
        self.text = BlipTextModel(told, add_pooling_layer=False)
        widths = (64, *HEAD_WIDTHS)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.mean, self.std = 0.0, 1.0

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Score [B] of pictures [B, 3, 32, 32] in [0, 1] for ids, mask [B, tokens]. The head has no activations, as ImageReward's."""
        seen = self.vision(normalise(pictures)).last_hidden_state
        told = self.text(input_ids=ids, attention_mask=attention_mask, encoder_hidden_states=seen, return_dict=True)
        score = told.last_hidden_state[:, 0]
        for layer in self.layers:
            score = layer(score)
        return (score.squeeze(-1) - self.mean) / self.std

    def save(self, folder: Path, tokenizer: CLIPTokenizer) -> None:
        self.vision.half().save_pretrained(folder / "vision")
        self.text.half().save_pretrained(folder / "text")
        save_file(
            {k: v.half().contiguous() for k, v in self.layers.state_dict(prefix="layers.").items()},
            folder / "head.safetensors",
        )
        tokenizer.save_pretrained(folder)
        settings = {"mean": self.mean, "std": self.std, "max_length": MAX_TOKENS, "image_size": IMAGE}
        (folder / "reward.json").write_text(json.dumps(settings, indent=1) + "\n")
        self.float()

    @staticmethod
    def load(folder: Path) -> Judge:
        model = Judge(CLIPTokenizer.from_pretrained(folder))
        model.vision = BlipVisionModel.from_pretrained(folder / "vision", dtype=torch.float32)
        model.text = BlipTextModel.from_pretrained(folder / "text", add_pooling_layer=False, dtype=torch.float32)
        head = {
            name.removeprefix("layers."): value.float()
            for name, value in load_file(folder / "head.safetensors").items()
        }
        model.layers.load_state_dict(head)
        settings: dict[str, Any] = json.loads((folder / "reward.json").read_text())
        model.mean, model.std = settings["mean"], settings["std"]
        return model.eval()

"""Kinds of adapters that users may know from peft and that are refused, with the reason and what to choose instead.

The names are those of peft 0.21, in lower case. The reasons are facts about peft's layers, measured on a ViT or read in
their code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_NO_GRADIENT = "gives the weight that it adapts no gradient in peft, so a warm-up would leave that weight still"
_NOT_ZERO = "does not begin at zero, so the switch would move the outputs"
_CHANGES_WEIGHT = "changes the weight that it adapts when it is attached, so the switch would move the outputs"
_FROM_WEIGHTS = "is made from a decomposition or the order of the weights, which are not there when an engine is built"
_DENSE = "multiplies with a matrix of the size of the weight, so its step costs more than one of full training"
_MIXES = "computes in fp32 next to BF16, which fails in a BF16 engine"
_TOKENS = "needs token embeddings or a decoder, which a ViT does not have"
_NOT_MERGEABLE = "cannot be merged into the weights, so that no plain ViT could be exported"
_NOT_BUILT = "is not built into this version"


@dataclass(frozen=True)
class Refused:
    """Why a kind is refused.

    reason: completes a sentence that begins with the kind.
    remedy: what a recipe can have in its place.
    """

    reason: str
    remedy: str


def _table() -> dict[str, Refused]:
    lora = "choose lora"
    large = "choose lora or dora"
    turns = "choose oft, which rotates the inputs, or dora"
    small = "choose vera or ia3, which train as few parameters"
    groups: list[tuple[str, str, tuple[str, ...]]] = [
        # Variants of LoRA that are settings here.
        ("is a setting of the kind lora", "choose lora, and set rs_alpha instead of alpha_over_r", ("rslora",)),
        ("is a setting of the learning rate", "choose lora, and set lr_scale of the phase, such as {b: 16}",
         ("loraplus", "lora+")),
        ("is a setting of the kind lora", "choose lora with options: {train_a: false}", ("lora_fa", "lorafa")),
        # Variants of LoRA that move the outputs or need something else.
        (_CHANGES_WEIGHT, "choose lora, with options.init kaiming or gaussian",
         ("pissa", "pissa_niter_4", "olora", "loftq", "kasa")),
        ("keeps the outputs only up to rounding, because its product is not zero",
         "choose lora, with options.init kaiming or gaussian", ("orthogonal",)),
        ("needs data or gradients before it is attached", "choose lora, with options.init kaiming or gaussian",
         ("eva", "corda", "lora_ga")),
        ("needs adapters that are already trained", lora, ("arrow",)),
        ("needs text, in which it is switched on", lora, ("alora",)),
        ("is made for weights that GPTQ has quantised",
         "choose lora, and set base of the phase, such as {dtype: int8}", ("qalora",)),
        ("takes 1.3 times as long as LoRA in peft", lora, ("velora",)),
        ("draws random numbers in the forward pass, so ranks and resumed runs would differ", large,
         ("monteclora", "pvera")),
        # Kinds with a reason in the way that they train.
        (_NO_GRADIENT, turns, ("hra",)),
        (_NO_GRADIENT, large, ("shira",)),
        ("keeps a matrix in x in per linear, 1.1 GB for a ViT-L, and takes three times as long as LoRA", turns,
         ("boft",)),
        (_NOT_ZERO, small, ("fourierft", "c3a", "vblora", "unilora", "frod")),
        (_NOT_ZERO, large, ("deft",)),
        (_DENSE, "choose lokr, which multiplies with two small matrices", ("loha",)),
        (_DENSE, large, ("hira", "randlora")),
        ("rebuilds the weight in each forward pass, so its step costs as many FLOPs as one of full training", large,
         ("glora",)),
        (_DENSE, small, ("waveft",)),
        (_FROM_WEIGHTS, turns, ("psoft",)),
        (_FROM_WEIGHTS, large, ("osf", "supertuning")),
        (_FROM_WEIGHTS, small, ("tinylora",)),
        (_MIXES, large, ("adamss",)),
        (_NOT_MERGEABLE, large, ("lily", "poly", "xlora")),
        # Kinds that could be built.
        ("is the former name of the kind miss", "choose miss", ("bone",)),
        (_NOT_BUILT, large, ("delora", "gralora", "peanut", "bdlora")),
        (_NOT_BUILT, small, ("road",)),
        # Sets of parameters.
        ("is a set of parameters, not an adapter", "set train of the phase, for example [norms, head]",
         ("ln_tuning",)),
        ("is a set of parameters, not an adapter", "set train of the phase, for example [biases, head]",
         ("beft", "bitfit")),
        # Kinds that cannot adapt a ViT.
        (_TOKENS, lora, ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "adaption_prompt",
                         "cpt", "cartridge", "shadow", "trainable_tokens")),
    ]
    return {name: Refused(reason, remedy) for reason, remedy, names in groups for name in names}


REFUSED: Mapping[str, Refused] = _table()

"""Buffers: tensors that a model computes anew from its config, and some that no client reads."""

import re

from cfmerge.models.layouts import Shape

RANDOM = r"rngs[./](\w+[./])?(key|count)([./](value|raw_value))?"  # the random numbers of Flax NNX, for dropout
# Integers of a training's progress, which differ from model to model.
COUNTERS = re.compile(rf"(^|[./])(num_batches_tracked|{RANDOM})$")

# The last parts of names. A buffer is known by its name whatever its dtype: other tools write integers as halves.
BUFFERS = re.compile(
    r"(^|[./_])("
    r"(original_)?inv_freq|(cos|sin)_cached|freqs_(cos|sin|cis)|rope[./]freqs|rotary\w*[./](freqs|cos|sin)"
    r"|position_ids|token_type_ids|relative_position_index|relative_coords_table|relative_position_bucket"
    r"|\w*pos\w*enc\w*[./]pe|embed_positions[./](weights|_float_tensor)"  # sinusoids
    r"|mask|masked_bias|tril|alibi|alibi_slopes|num_batches_tracked"
    r"|mel_filters|mel_basis|mel_scale[./]fb|(hann_|stft[./]|spectrogram[./])window"  # audio
    r"|pixel_(mean|std)|image_(mean|std)"
    rf"|{RANDOM}"
    r")$"
)
# The noise schedule of a diffusion model, stored beside it by the files of Stable Diffusion 1 and 2.
SCHEDULE = re.compile(
    r"^(betas|alphas_cumprod(_prev)?|(log_|sqrt_)\w*alphas_cumprod|posterior_(log_)?\w*(variance|mean_coef\d)\w*"
    r"|lvlb_weights|model_ema[./](decay|num_updates))$"
)
# T5's first files hold a bias that its decoder never used.
UNREAD = re.compile(r"EncDecAttention[./]relative_attention_bias[./]weight$")
ATTENTION_BIAS = re.compile(r"attn(ention)?[./](attention[./])?(bias|masked_bias)$")

# A buffer that may hold what was learned (Marian's), and that BART and Pegasus make anew where a file lacks it.
OPTIONAL = re.compile(r"(^|[./])final_logits_bias$")


def is_optional(name: str) -> bool:
    """Whether a model may lack a tensor that is merged where all have it; otherwise the base's is kept."""
    return bool(OPTIONAL.search(name))


def is_buffer(name: str, shape: Shape) -> bool:
    """Whether a tensor is no parameter: the base's is kept, and a model may lack it."""
    known = BUFFERS.search(name) or SCHEDULE.search(name) or UNREAD.search(name)
    return bool(known) or is_attention_mask(name, shape)


def is_counter(name: str) -> bool:
    """Whether the base's integers are kept where the experts have others: no parameter hangs on them."""
    return bool(COUNTERS.search(name))


def is_attention_mask(name: str, shape: Shape) -> bool:
    """GPT-2's causal mask, stored by some versions as `attn.bias` of shape (1, 1, positions, positions)."""
    is_mask = shape == () or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])
    return is_mask and bool(ATTENTION_BIAS.search(name))

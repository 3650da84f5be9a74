"""The parameters of flash-attn's private functions, as read in the sources of its versions.

Parameters before "|" have no default. All can be given by position or by name.
"""

from __future__ import annotations

import inspect

_LAST_OF_2 = "window_size_left window_size_right softcap alibi_slopes"
_SIZES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
_FA2 = {
    "_flash_attn_forward": f"q k v dropout_p softmax_scale causal {_LAST_OF_2} return_softmax |",
    "_flash_attn_backward": f"dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal {_LAST_OF_2} "
    "deterministic | rng_state",
    "_flash_attn_varlen_forward": f"q k v {_SIZES} dropout_p softmax_scale causal | {_LAST_OF_2} return_softmax "
    "block_table leftpad_k seqused_k zero_tensors",
    "_flash_attn_varlen_backward": f"dout q k v out softmax_lse dq dk dv {_SIZES} dropout_p softmax_scale causal "
    f"{_LAST_OF_2} deterministic | rng_state zero_tensors",
}
_MIDDLE_OF_3 = (
    "cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx "
    "leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale causal"
)
_BACKWARD_OF_3 = "cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv softmax_scale"
_FA4_FORWARD = (
    "cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k page_table softmax_scale "
    "causal softcap window_size_left window_size_right learnable_sink tile_mn mma_pv_is_rs intra_wg_overlap "
    "num_threads num_splits pack_gqa _arch score_mod mask_mod block_sparse_tensors return_lse out lse aux_tensors"
)
_FA4_BACKWARD = (
    "q k v out dout lse | softmax_scale causal softcap window_size_left window_size_right m_block_size n_block_size "
    "num_threads pack_gqa num_stages_Q num_stages_dO SdP_swapAB dKV_swapAB dQ_swapAB AtomLayoutMSdP AtomLayoutNdKV "
    "AtomLayoutMdQ V_in_regs cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k deterministic "
    "dq dk dv score_mod score_mod_bwd mask_mod aux_tensors"
)
PARAMETERS: dict[tuple[int, str], dict[str, str]] = {
    (2, "2.7.4 to 2.8.3"): _FA2,
    (3, "2.8.0 (2025)"): {
        "_flash_attn_forward": f"q k v k_new v_new qv out {_MIDDLE_OF_3} | window_size attention_chunk softcap "
        "rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin",
        "_flash_attn_backward": f"dout q k v out softmax_lse {_BACKWARD_OF_3} causal | window_size softcap "
        "deterministic sm_margin",
    },
    (3, "August 2026"): {
        "_flash_attn_forward": f"q k v | k_new v_new qv out_ {_MIDDLE_OF_3} window_size_left window_size_right "
        "attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin",
        "_flash_attn_backward": f"dout q k v out softmax_lse | {_BACKWARD_OF_3} is_causal window_size_left "
        "window_size_right softcap deterministic sm_margin",
    },
    (4, "4.0.0b10"): {
        "_flash_attn_fwd": f"q k v | qv {_FA4_FORWARD} q_descale k_descale v_descale gather_kv_indices",
        "_flash_attn_bwd": f"{_FA4_BACKWARD} block_sparse_tensors dlse",
    },
    (4, "4.0.0b36"): {
        "_flash_attn_fwd": f"q k v | qv {_FA4_FORWARD} aux_scalars q_descale k_descale v_descale gather_kv_indices "
        "scheduler_metadata seqlen_k_per_split disable_scheduler_metadata gather_bwd_recompute_p",
        "_flash_attn_bwd": f"{_FA4_BACKWARD} aux_scalars block_sparse_tensors dlse learnable_sink",
    },
}
"""The parameters of each function of each version."""


def signature(parameters: str) -> inspect.Signature:
    """Return a signature of parameters from `PARAMETERS`."""
    required, optional = (names.split() for names in parameters.split("|"))
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, either) for name in required]
        + [inspect.Parameter(name, either, default=None) for name in optional]
    )

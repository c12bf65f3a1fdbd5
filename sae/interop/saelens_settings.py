"""What SAELens' settings say, of every version from 0.1 to 6: handled, harmless, or a reason to refuse.

Source: the configuration classes of sae-lens 1.0, 2.1, 3.5, 3.23, 4.4, 5.11, 6.0, 6.6 and 6.54 (PyPI).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sae.interop import assemble, settings
from sae.interop.processed_model import known_layer_norm, refuse_processed, width_of

_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_HANDLED = settings.names("""
    activation_fn activation_fn_kwargs apply_b_dec_to_input architecture d_in d_out d_sae finetuning_scaling_factor
    hook_head_index hook_head_index_out hook_name hook_name_out k metadata model_from_pretrained_kwargs model_name
    normalize_activations rescale_acts_by_decoder_norm reshape_activations
""")
# How the training ran, or what only the loss used. None of it is part of what a finished dictionary computes.
_HARMLESS = settings.names("""
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_data autocast_lm
    autocast_sae aux_loss_coefficient b_dec_init_method buffer_size_gb cached_activations_path checkpoint_path
    compile_llm compile_sae context_size dataset_path dataset_trust_remote_code dead_feature_estimation_method
    dead_feature_threshold dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm
    decoder_orthogonal_init device disable_concat_sequences dtype entity eval_batch_size_prompts
    eval_every_n_wandb_logs exclude_special_tokens expansion_factor feature_reinit_scale feature_sampling_method
    feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path hf_hook_name hf_hook_name_out
    hf_is_private_repo hf_num_shards hf_repo_id hf_revision hook_eval hook_layer hook_layer_out hook_point_eval
    hook_point_layer init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient
    l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode llm_device log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger lp_norm lr lr_decay_steps lr_end
    lr_scheduler_name lr_warm_up_steps matryoshka_widths model_batch_size model_class_name mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles n_shuffles_final
    n_shuffles_in_entire_dir n_shuffles_with_last_section neuronpedia_id new_cached_activations_path noise_scale
    normalize_sae_decoder output_path pre_act_loss_coefficient prefetch_llm_batches prepend_bos resample_batches
    resume resume_from_checkpoint run_name sae_compilation_mode sae_lens_training_version sae_lens_version
    save_final_checkpoint scale_sparsity_penalty_by_decoder_norm seed seqpos_slice sequence_separator_token shuffle
    shuffle_every_n_buffers store_batch_size store_batch_size_prompts streaming target_l0 tokens_per_buffer
    topk_threshold_lr total_training_samples total_training_steps total_training_tokens train_batch_size
    train_batch_size_samples train_batch_size_tokens training_samples training_tokens use_cached_activations
    use_chat_formatting use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
""")
_OTHER_ARCHITECTURES = {
    "abstopk": "its features can be negative; ours cannot.",
    "matching_pursuit": "it encodes by matching pursuit, step by step; ours encode in one step.",
    "temporal": "it reads earlier positions too; ours read one position.",
    **dict.fromkeys(
        ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
        "it is a transcoder: it predicts activations of another hook point.",
    ),
}
_CENTRED_BEFORE = (3, 20)  # before this version, models were opened with TransformerLens' processing on
_ROW_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "unit_mean_square"}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of any version under the names of version 6, those of `metadata` included."""
    merged = {**assemble.section(config, "metadata"), **{k: v for k, v in config.items() if k != "metadata"}}
    return {_RENAMED.get(name, name): value for name, value in merged.items()}


def refuse_other_semantics(config: Mapping[str, Any], known: Mapping[str, Any], where: Path) -> None:
    """Raises: InteropError for what a dictionary of ours cannot do, and for settings that are not known.

    `known` is `flat(config)`. What is in `metadata` under a name that SAELens does not read is a free remark.
    """
    top = {name: value for name, value in flat({**config, "metadata": {}}).items() if name != assemble.OWN_CONFIG}
    settings.refuse_unknown(top, _HANDLED | _HARMLESS, where)
    architecture = known.get("architecture")
    if isinstance(architecture, str):
        assemble.require(architecture not in _OTHER_ARCHITECTURES, where, _OTHER_ARCHITECTURES.get(architecture, ""))
    place, target = assemble.first_text(known, "hook_name") or "", assemble.first_text(known, "hook_name_out")
    assemble.require(
        known.get("hook_head_index") is None,
        where,
        "it reads a single attention head (hook_head_index), and our rows hold all heads of a hook point.",
    )
    assemble.require(target in (None, place), where, f"it is a transcoder: it reads {place} and predicts {target}.")
    reshape = known.get("reshape_activations")
    assemble.require(
        settings.is_off(reshape) or (reshape == "hook_z" and place.endswith("_z")),
        where,
        f"it reshapes activations of {place or 'an unnamed hook point'} (reshape_activations = {reshape!r}); only the "
        "heads of hook_z can be joined, as our rows join them.",
    )
    kwargs = known.get("activation_fn_kwargs")
    if isinstance(kwargs, dict):
        settings.refuse_unknown(kwargs, ("k",), where)


def row_norm(known: Mapping[str, Any], where: Path) -> str | None:
    """Our row norm for its normalisation; None for none, or for one that can be folded into the weights."""
    normalize = known.get("normalize_activations")
    foldable = (True, "expected_average_only_in", "covariance_whitening")
    named = normalize in _ROW_NORMS if isinstance(normalize, str) else False
    assemble.require(
        settings.is_off(normalize) or normalize in foldable or named,
        where,
        f"it normalises activations in a way that is not known here (normalize_activations = {normalize!r}).",
    )
    return _ROW_NORMS.get(str(normalize))


def is_centred(config: Mapping[str, Any], known: Mapping[str, Any], where: Path, ignore: Collection[str] = ()) -> bool:
    """Whether it was trained on activations without their mean over d_in (`center_writing_weights`).

    So say its `model_from_pretrained_kwargs`; and so were all models with LayerNorm opened before version 3.20, whose
    files say nothing. Those are recognised by what they lack: no `metadata`, no such setting, no later version; and by
    their width, which is that of the model they name.
    Raises: InteropError for processing that cannot be undone, or when it depends on a norm that is not known.
    """
    place, model = assemble.first_text(known, "hook_name"), assemble.first_text(known, "model_name")
    kwargs = known.get("model_from_pretrained_kwargs")
    if kwargs is not None:
        assemble.require(
            isinstance(kwargs, dict), where, f"model_from_pretrained_kwargs must be an object: {kwargs!r}."
        )
        return refuse_processed(kwargs, place, model, where)
    if "metadata" in config or _version(known) >= _CENTRED_BEFORE or width_of(model) != known.get("d_in"):
        return False
    processed = {name: True for name in settings.IMPLIED if name not in ignore}
    return known_layer_norm(model) is True and refuse_processed(processed, place, model, where)


def _version(known: Mapping[str, Any]) -> tuple[int, ...]:
    text = assemble.first_text(known, "sae_lens_version", "sae_lens_training_version") or "0"
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split(".")[:2])


def remarks(known: Mapping[str, Any], *, centred_unsaid: bool) -> list[str]:
    """What a user should know and the weights do not show."""
    notes = []
    if centred_unsaid:
        notes.append(
            "the file does not say it, but SAELens before 3.20 opened models with centred writing weights; if this "
            "dictionary was not trained so, import it with --ignore center_writing_weights"
        )
    if not settings.is_off(known.get("seqpos_slice")):
        notes.append(f"trained on the positions {known['seqpos_slice']!r} of each context only (seqpos_slice)")
    if not settings.is_off(known.get("exclude_special_tokens")):
        notes.append("trained without the rows of special tokens (exclude_special_tokens)")
    if isinstance(known.get("noise_scale"), int | float) and known["noise_scale"] > 0:
        notes.append("trained with noise on its pre-activations (noise_scale); none is added here")
    return notes

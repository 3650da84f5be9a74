"""A failure here means: DilatedTrainer accepts an option or a batch with which it would not train as one process."""

from __future__ import annotations

import pytest
import torch

from longnet_dist import Pattern, SequenceMesh

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def job():
    """The module with the trainers; importing transformers is slow, and warns."""
    from tests.launch.trainers import hf_trainer_job

    return hf_trainer_job


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"torch_compile": True}, "torch_compile must be False"),
        ({"train_sampling_strategy": "group_by_length"}, "is 'group_by_length'; it must be 'random' or 'sequential'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "is 'batch_rebalance'; it must be"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches and split_batches must be off"),
        ({"accelerator_config": {"split_batches": True}}, "dispatch_batches and split_batches must be off"),
        ({"compute_loss_func": print}, "compute_loss_func must be None: the loss is the model's own"),
        ({"compute_metrics": print}, "compute_metrics must be None: logits would be"),
    ],
)
def test_an_option_that_changes_training_is_an_error(job, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        job.make_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed and FSDP"),
        ("is_fsdp_enabled", True, "DeepSpeed and FSDP"),
        ("model_accepts_loss_kwargs", False, "LlamaForCausalLM takes no num_items_in_batch"),
    ],
)
def test_what_a_launcher_or_a_model_sets_is_an_error(job, tmp_path, name, value, message):
    trainer = job.make_trainer(tmp_path)
    assert trainer._problem() is None
    setattr(trainer, name, value)
    assert message in trainer._problem()


def test_several_gpus_in_one_process_are_an_error(job, tmp_path):
    trainer = job.make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    assert "start one process for each" in trainer._problem()


def test_a_model_without_the_trainers_mesh_is_an_error(job, tmp_path):
    from transformers import LlamaForCausalLM

    other_mesh = SequenceMesh(None, job.PATTERN, job.SEQ_LEN)
    plain = LlamaForCausalLM(job.make_model().config)
    with pytest.raises(ValueError, match=r"does not attend by a pattern: apply\(model, pattern, mesh\) first"):
        job.make_trainer(tmp_path, model=plain)
    changed = job.make_model()
    changed.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="does not attend by a pattern"):
        job.make_trainer(tmp_path, model=changed)
    with pytest.raises(ValueError, match="was applied with the mesh None, and the trainer has SequenceMesh"):
        job.make_trainer(tmp_path, other_mesh, model=job.make_model())


def test_a_model_that_the_trainer_makes_is_checked(job, tmp_path):
    from transformers import LlamaForCausalLM, TrainingArguments

    models = [job.make_model(), LlamaForCausalLM(job.make_model().config)]
    args, dataset = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1), job.make_sequences(2)
    trainer = job.DilatedTrainer(None, args, train_dataset=dataset, mesh=None, model_init=lambda: models.pop(0))
    with pytest.raises(ValueError, match="does not attend by a pattern"):
        trainer.train()


def make_batch(job, **changes):
    batch = {name: torch.stack([x[name] for x in job.make_sequences(2)]) for name in ("input_ids", "labels")} | changes
    return {name: x for name, x in batch.items() if x is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "the collator returned input_ids; it must return input_ids and labels"),
        ({"input_ids": None}, "it must return input_ids and labels"),
        ({"seq_idx": torch.zeros(3)}, "seq_idx; it must return .*DataCollatorWithFlattening"),
        ({"cu_seq_lens_q": torch.tensor([0, 44])}, "its last one N = 45"),
        (
            {"shift_labels": torch.zeros(2, 45)},
            "shift_labels; it must return input_ids and labels, whole and not shifted",
        ),
        ({"attention_mask": torch.ones(2, 1, 45, 45)}, r"each must be a tensor, \(B, N\)"),
        ({"labels": torch.zeros(2, 44).long()}, r"'labels': \(2, 44\)\}; each must be a tensor"),
        ({"input_ids": [[1] * 45] * 2}, r"'input_ids': 'list'"),
        (
            {"position_ids": torch.stack([torch.arange(45), torch.arange(45) + 1])},
            "must count from 0, and begin anew",
        ),
        ({"input_ids": torch.ones(2, 46).long(), "labels": torch.ones(2, 46).long()}, "of 46 tokens.* pad .* or pack"),
    ],
)
def test_a_batch_that_cannot_be_split_is_an_error(job, tmp_path, changes, message):
    mesh = SequenceMesh(None, job.PATTERN, job.SEQ_LEN)
    trainer = job.make_trainer(tmp_path, mesh, eval_strategy="no")
    trainer.data_collator = lambda samples: make_batch(job, **changes)
    trainer.args.remove_unused_columns = False
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=message):
            call()


def test_padding_between_tokens_is_an_error(job, tmp_path):
    trainer = job.make_trainer(tmp_path)
    trainer.data_collator = lambda _: make_batch(job, attention_mask=(torch.arange(45) % 9 > 3).long().expand(2, -1))
    with pytest.raises(ValueError, match="padding between the tokens of a document"):
        trainer.train()


def test_usual_positions_are_accepted_and_any_length_without_a_mesh(job, tmp_path):
    losses = []
    for rows in (45, 30):
        for positions in (None, torch.arange(rows).expand(2, -1)):
            trainer = job.make_trainer(tmp_path, rows=rows, max_steps=1, save_strategy="no")
            samples = job.make_sequences(2, rows)
            batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
            batch |= {} if positions is None else {"position_ids": positions}
            trainer.data_collator = lambda _, batch=batch: batch
            losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


def test_predictions_are_an_error(job, tmp_path):
    trainer = job.make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"predict\(\) is not supported: logits would be this rank's rows"):
        trainer.predict(job.make_sequences(2))
    trainer.compute_metrics = print
    with pytest.raises(ValueError, match="predictions are not supported"):
        trainer.evaluate()


def test_a_mesh_of_one_process_trains_as_no_mesh_and_as_the_stock_trainer(job, tmp_path):
    mesh = SequenceMesh(None, job.PATTERN, job.SEQ_LEN)
    assert mesh.pattern == Pattern((8, 48), (1, 4))
    ours = [job.train(tmp_path / str(n), chosen) for n, chosen in enumerate((None, mesh))]
    stock = job.train(tmp_path / "stock", trainer_class=job.Trainer)
    assert ours[0] == ours[1] == stock

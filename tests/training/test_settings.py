"""The settings of a run, as its files and its command line name them."""

import dataclasses
from pathlib import Path

import pytest

from mlsae.config import SAEConfig, SAESweep, TrainArguments, TrainConfig, check_config
from mlsae.data.config import DataConfig
from mlsae.errors import InputError
from mlsae.train import parse
from mlsae.training.settings import (
    check_same,
    differ_in_weights_seed,
    joint_settings,
    settings_of,
)


def test_settings_have_the_names_of_the_flags():
    """So that a file tells how to give the command again, and files of 0.1 stay readable."""
    settings = settings_of(TrainConfig(DataConfig(layers=(0, 2)), sae=SAEConfig(k=8)))
    assert settings["model"] == settings["dataset"] == "builtin"
    assert settings["layers"] == [0, 2]
    assert settings["sae"]["k"] == 8
    flags = {f"--{name}" for name in settings if name not in ("model", "dataset", "sae")}
    values = {"--layers": ["0", "2"], "--log": ["wandb"], "--decoder_optimizer": ["adam"]}
    values["--betas"] = ["0.5", "0.9"]
    words = []
    for flag in sorted(flags - {"--overwrite", "--resume", "--moved", "--trust_remote_code"}):
        value = settings[flag.removeprefix("--")]
        given = values.get(flag, _words(value) if value not in (None, []) else ["1"])
        if flag.startswith("--model_") or flag == "--push_to_hub":
            continue  # names, tried elsewhere
        words += [flag, *given]
    assert parse(words)


def _words(value):
    return list(map(str, value)) if isinstance(value, list) else [str(value)]


def test_one_sae_is_a_sweep_of_one():
    config = TrainConfig(sae=SAEConfig(expansion=4, k=8, dead_tokens=7), tokens=1000)
    assert TrainArguments.defaults(config).configs() == [config]
    sized = dataclasses.replace(config, sae=SAEConfig(n_latents=512))
    assert TrainArguments.defaults(sized).configs() == [sized]
    seeded = dataclasses.replace(config, sae=SAEConfig(seed=3))
    assert TrainArguments.defaults(seeded).configs() == [seeded]


def test_only_what_changes_the_result_must_be_the_same():
    configs = TrainArguments(sae=SAESweep(expansion=(2, 3), k=(8,))).configs()
    saved = joint_settings(configs)
    assert saved["sae"]["expansion"] == [2, 3]
    assert saved["sae"]["k"] == 8
    changed = {
        "device": "cpu", "micro_tokens": 512, "resume": True, "moved": True, "log": ("wandb",),
        "log_tokens": 7, "eval_every": 8, "eval_tokens": 9, "checkpoint_tokens": 10,
        "keep_checkpoints": 1, "out": Path("other"), "timeout": 5.0,
    }  # fmt: skip
    check_same([dataclasses.replace(c, **changed) for c in configs], saved)
    with pytest.raises(InputError, match=r"--seed must be 0 to resume this run.* got 1"):
        check_same([dataclasses.replace(c, seed=1) for c in configs], saved)
    with pytest.raises(InputError, match=r"--sae.expansion must be 2 3 to resume"):
        check_same(configs[:1], saved)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, float("nan")])
def test_training_needs_text_of_both_sides(share):
    config = TrainConfig(DataConfig(heldout_share=share))
    with pytest.raises(InputError, match=r"--heldout_share must .* less than 1, since the rest"):
        check_config(config)


def test_a_run_ended_by_bad_records_resumes_as_the_error_advises():
    config = TrainConfig(DataConfig(max_bad_records=0.2), resume=True)
    check_same([config], joint_settings([TrainConfig()]))
    with pytest.raises(InputError, match=r"--heldout_share must be 0.05 to resume"):
        check_same([TrainConfig(DataConfig(heldout_share=0.2))], joint_settings([TrainConfig()]))


def test_a_run_from_before_a_setting_is_resumed_as_it_was_made():
    """Nothing was dropped but special tokens, when nothing could be said of it."""
    config = TrainConfig(DataConfig(drop_norm="off"))
    saved = joint_settings([config])
    for name in ("drop_norm", "drop_positions", "drop_tokens"):
        del saved[name]
    check_same([config], saved)
    with pytest.raises(InputError, match=r"--drop_norm must be off to resume .* got auto"):
        check_same([TrainConfig()], saved)
    assert parse(["--preset", "paper"])[0].data.drop_norm == "off"


def test_a_run_from_before_seeds_of_weights_resumes():
    saved = joint_settings([TrainConfig()])
    del saved["sae"]["seed"]
    check_same([TrainConfig()], saved)
    with pytest.raises(InputError, match=r"--seeds must be None to resume .* got 0"):
        check_same([TrainConfig(sae=SAEConfig(seed=0))], saved)


def test_runs_are_one_but_for_the_seed_of_their_weights():
    def about(extensions=None, **chosen):
        training = settings_of(dataclasses.replace(TrainConfig(), **chosen))
        return {"training": training, "heldout": {}} | (
            {"extensions": extensions} if extensions else {}
        )

    plain, one = about(), about(sae=SAEConfig(seed=1), out=Path("x"), micro_tokens=512)
    assert differ_in_weights_seed(plain, one)
    assert differ_in_weights_seed(one, about(sae=SAEConfig(seed=2)))
    older = about()
    del older["training"]["sae"]["seed"], older["training"]["dataset_split"]
    assert differ_in_weights_seed(older, one)
    for other in (
        about(sae=SAEConfig(seed=0)),  # the same weights
        about(seed=1),  # other rows, too
        about(sae=SAEConfig(seed=1, k=16)),
        about(sae=SAEConfig(seed=1), tokens=900_000),
        about([{"at": 1, "from": 1, "to": 2}], sae=SAEConfig(seed=1)),
        {"training": one["training"]},  # stopped before its end
        {"training": None, "heldout": {}},
        {},
    ):
        assert not differ_in_weights_seed(plain, other)


def test_a_run_from_before_a_model_s_options_existed_resumes():
    config = TrainConfig()
    saved = joint_settings([config])
    for name in ("revision", "trust_remote_code", "eos_token"):
        del saved[name]
    check_same([config], saved)
    for option in ({"revision": "step1"}, {"eos_token": "a"}):
        (name,) = option
        with pytest.raises(InputError, match=f"--{name} must be None to resume"):
            check_same([TrainConfig(DataConfig(**option))], saved)

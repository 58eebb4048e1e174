"""What the runs of several test files share: flags of a run of seconds, its drawn data, its finished directory."""
import pytest

import data
import tal

TINY = ("--patch 16 --hid 32 --layers 1 --hyper-heads 4 --rank 4 --mlp 32,48 --ancestry-width 16 --ancestry-depth 1 --batch-size 200 "
        "--ancestry-epochs 0.005 --pretrain-epochs 0.03 --tune-epochs 0.08 --train-epochs 0.1 --tune-tasks pedestrian,digits "
        "--split val --log-every 1 --save-every 2 --device cpu").split()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """One cache of drawn data for all runs of a session."""
    folder = tmp_path_factory.mktemp("data")
    data.load_many([data.BASE, *data.DECATHLON, "clothing"], str(folder), 32)
    return folder


@pytest.fixture(scope="session")
def tuned(drawn, tmp_path_factory):
    """A run directory with ancestry.pt, pretrain.pt and tune.pt."""
    folder = tmp_path_factory.mktemp("tuned")
    tal.main([*TINY, "--stage", "tune", "--data-dir", str(drawn), "--output", str(folder)])
    return folder

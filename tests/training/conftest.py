from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base_model(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", tiny.sentences(240))


@pytest.fixture
def environment(tmp_path: Path, tiny_bert: Path, tiny_data: Path) -> dict[str, str]:
    """A whole job that takes about a second."""
    return {
        "DATASET": str(tiny_data),
        "BASE_MODEL": str(tiny_bert),
        "NUM_MAX_POSITIONS": "32",
        "MODEL_PATH": str(tmp_path / "models"),
        "DATA_PATH": str(tmp_path / "data"),
        "LOG_PATH": str(tmp_path / "logs"),
        "N_EPOCHS": "3",
        "BATCH_SIZE": "16",
        "LR": "5e-3",
        "DEVICE": "cpu",
        "PRECISION": "fp32",
        "OMP_NUM_THREADS": "1",
    }

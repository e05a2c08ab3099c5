"""Which data belong to some training data as those to test on."""

from contrastive.data.sources import open_source
from contrastive.data.sources.open import held_out_spec


def test_held_out_splits_by_name():
    for scheme in ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "scenes"):
        assert held_out_spec(scheme) == held_out_spec(f"{scheme}:train") == f"{scheme}:test"
        assert held_out_spec(f"{scheme}:test") is None
    assert held_out_spec("digits:all") is None and held_out_spec("digits,scenes") is None
    assert held_out_spec("") is None and held_out_spec("s3://bucket/train-{0..9}.tar") is None


def test_held_out_files_beside_the_training_files(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "val.parquet", "train.csv", "train-0.tar", "dev-0.tar"):
        (tmp_path / name).write_bytes(b"")
    assert held_out_spec(f"{tmp_path}/train-*.parquet") == f"{tmp_path}/val.parquet"
    (tmp_path / "test-0.parquet").write_bytes(b"")
    assert held_out_spec(f"{tmp_path}/train-*.parquet") == f"{tmp_path}/test-0.parquet"
    (tmp_path / "test-1.parquet").write_bytes(b"")
    assert held_out_spec(f"{tmp_path}/train-{{0..1}}.parquet") == f"{tmp_path}/test*.parquet"
    assert held_out_spec(f"{tmp_path}/train-0.tar") == f"{tmp_path}/dev-0.tar"
    assert held_out_spec(f"{tmp_path}/train.csv") is None
    assert held_out_spec(f"{tmp_path}/training.parquet") is None
    assert held_out_spec(f"{tmp_path}/none/train.parquet") is None


def test_held_out_folder_beside_the_training_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert held_out_spec(f"{tmp_path}/train") is None
    (tmp_path / "val").mkdir()
    assert held_out_spec(f"{tmp_path}/train/") == f"{tmp_path}/val"
    (tmp_path / "test").mkdir()
    assert held_out_spec(f"{tmp_path}/train") == f"{tmp_path}/test" and held_out_spec(f"{tmp_path}/test") is None


def test_held_out_split_of_a_saved_dataset(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert held_out_spec(f"{tmp_path}:train") == f"{tmp_path}:validation"
    assert held_out_spec(f"{tmp_path}:validation") is None
    import datasets

    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda path: ["train", "test"] if path == "me/a" else 1 / 0
    )
    assert held_out_spec("hf:me/a") == held_out_spec("hf:me/a:train") == "hf:me/a:test"
    assert held_out_spec("hf:me/b") is None and held_out_spec("hf:me/a:test") is None


def test_held_out_real_files(shared_data):
    spec = held_out_spec(f"{shared_data}/cifar10/train-*.parquet")
    assert len(open_source(spec)) == 10_000
    assert held_out_spec(f"{shared_data}/flickr8k/train-{{000000..000005}}.tar").endswith("dev-000000.tar")

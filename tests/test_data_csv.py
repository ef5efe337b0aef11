"""CSV files of images."""

import os

import pytest

from clip_helpers import write_image
from saft_clip.data import available_splits, load_dataset
from saft_clip.data.layouts import recognise
from saft_clip.errors import DataError


def load(spec, split="train"):
    return load_dataset(str(spec), split, lambda image: image)


def write(path, text, images=("a/1.png", "b/2.png", "3.png")):
    for image in images:
        write_image(path.parent / image)
    path.write_text(text)
    return path


def test_labels_and_splits(tmp_path):
    file = write(
        tmp_path / "pets.csv",
        "path,label,split,caption\na/1.png,big_cat,train,x\n\nb/2.png,ant,test,y\n"
        '3.png,"a dog, brown",train,z\n',
    )
    dataset = load(file)
    assert dataset.name == "pets"
    assert dataset.class_names == ("a dog, brown", "ant", "big cat")
    assert dataset.labels.tolist() == [2, 0]
    assert dataset[1][0].size == (24, 20)
    assert load(file, "test").labels.tolist() == [1]
    assert available_splits(str(file)) == ("train", "test")
    assert recognise(str(file)).kind == "CSV file"
    with pytest.raises(DataError, match=r"pets.csv has no val split, only train, test"):
        load(file, "val")


@pytest.mark.parametrize("column", ["path", "filepath", "image", " Image "])
def test_without_splits_every_split_is_all(tmp_path, column):
    file = write(tmp_path / "x.tsv", f"﻿{column}\tLABEL\na/1.png\tant\nb/2.png\tbee\n")
    assert available_splits(str(file)) == ()
    for split in ("train", "val", "test"):
        assert load(file, split).labels.tolist() == [0, 1]


def test_paths_are_relative_to_the_file_or_absolute(tmp_path, monkeypatch):
    file = write(tmp_path / "x.csv", f"path,label\na/1.png,ant\n{tmp_path}/b/2.png,bee\n")
    monkeypatch.chdir(tmp_path)
    for spec in (file, "x.csv"):
        assert [load(spec)[i][0].size for i in range(2)] == [(24, 20)] * 2
    assert os.path.samefile(load(file).images[1], tmp_path / "b" / "2.png")


def test_a_caption_is_a_class_only_if_asked_for(tmp_path):
    file = write(tmp_path / "x.csv", "filepath,title\na/1.png,an ant\nb/2.png,a bee\n")
    with pytest.raises(DataError, match=r"no column label: a title is no class; .*x.csv::title"):
        load(file)
    assert load(f"{file}::title").class_names == ("a bee", "an ant")
    with pytest.raises(DataError, match=r"no column name: a title"):
        load(f"{file}::name")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column path .or filepath, or image., but nothing"),
        ("label\nx\n", "has no column path .*, but label"),
        ("path,class\na/1.png,x\n", "has no column label, but path, class"),
        ("path,label\n", "lists no image"),
        ("path,label\na/1.png\n", "line 2 of .*x.csv has no label"),
        ("path,label\n,x\n", "line 2 of .*x.csv has no path"),
        ("path,label,split\na/1.png,x,dev\n", "line 2 of .* of the split 'dev'; write train, val"),
        ("path,label,split\na/1.png,x\n", "line 2 of .* of the split ''"),
        ("path,label\nnone.png,x\n", "first image of .*, none.png, is not there; paths are rel"),
        ("path,label\na\x1bb,x\n", r"first image of .*, a\\x1bb, is not there"),
        ("path,label\n" + "x" * 200_000 + ",x\n", "is not a CSV file in UTF-8 .field larger"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    file = write(tmp_path / "x.csv", text)
    with pytest.raises(DataError, match=message):
        load(file)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(DataError, match=r"x.csv cannot be read: No such file"):
        load(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xff\xfe")
    with pytest.raises(DataError, match="is not a CSV file in UTF-8"):
        load(tmp_path / "x.csv")

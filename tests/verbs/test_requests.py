import numpy as np
import pytest

from cmd_jax.data.requests import class_request
from cmd_jax.errors import UserError
from cmd_jax.verbs import requests


def test_labels_of_clips_are_matched_to_the_model_s_by_name():
    """The held-out part may lack classes, and a class that has no usable clip is none of the data's."""
    clips = requests.Clips(np.zeros(4), np.array([1, 0, 1, 2]), None, ("b", "d"))
    assert requests.labels_of(clips, ("a", "b", "c", "d"), "here").tolist() == [3, 1, 3, 4]  # the last has no class
    assert requests.labels_of(clips, (), "here").tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="^data=here: .*: d; name sampling.classes$"):
        requests.labels_of(clips, ("a", "b"), "here")
    with pytest.raises(UserError, match="^data=here: .* it has none; name sampling.classes$"):
        requests.labels_of(clips._replace(labels=np.zeros(4, int), class_names=()), ("a",), "here")


def test_classes_by_name_and_number():
    names = ("10", "cat", "dog, big", "1")

    def labels(classes, names, count):
        return class_request(classes, names, count).conditions["label"].tolist()

    assert labels([], names, 6) == [0, 1, 2, 3, 0, 1]
    assert labels(["cat", "0", 3], names, 4) == [1, 0, 3, 1]
    assert labels(["10", "1"], names, 2) == [0, 3]  # a name goes before a number
    assert labels([], (), 2) == [0, 0]
    for wrong in ("4", "-1", 4, "cta", "9" * 5000, "²", "🐈"):
        with pytest.raises(UserError, match="no such class; did you mean one of: ") as error:
            labels([wrong], names, 1)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean one of: cat, "):
        labels(["cta"], names, 1)
    with pytest.raises(UserError, match="without classes"):
        labels(["cat"], (), 1)
    with pytest.raises(UserError, match="^sampling.classes=cat,1: 2 classes, but only 1 videos; set sampling.num=2"):
        labels(["cat", 1], names, 1)

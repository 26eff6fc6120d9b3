"""Batches of photos and labels for `fit()`."""

from collections.abc import Callable, Sequence

import keras
import numpy as np


class Photographs(keras.utils.PyDataset):
    """Loads photos from files, in batches of (pixels, class numbers).

    Args:
        files: Sequence of pairs of a path and a class number.
        load: Function from a path to pixels, see `images.photo_loader.image_loader()`.
        batch_size: Integer.
        shuffle: Boolean, whether to draw a new order for each epoch. Defaults to False.
    """

    def __init__(self, files: Sequence[tuple[str, int]], load: Callable, batch_size: int, shuffle: bool = False):
        super().__init__(workers=2)
        self.files, self.load, self.batch_size, self.shuffle = list(files), load, batch_size, shuffle
        self._random = np.random.default_rng(0)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.files) // self.batch_size)

    def on_epoch_end(self):
        """Draws the order of the next epoch."""
        count = len(self.files)
        self._order = self._random.permutation(count) if self.shuffle else np.arange(count)

    def __getitem__(self, index):
        chosen = [self.files[place] for place in self._order[index * self.batch_size : (index + 1) * self.batch_size]]
        return np.stack([self.load(path) for path, _ in chosen]), self.labels(chosen)

    @staticmethod
    def labels(files) -> np.ndarray:
        """Returns the class numbers of files."""
        return np.array([label for _, label in files], "int32")

"""Training data: readers of label files, a synthetic set, augmentation, and a check of both."""

from trainer.data.augment import AugmentSettings, TrainingSet
from trainer.data.check import check_data
from trainer.data.dataset import Dataset, FileSample, Kind, Problem, Report, Sample
from trainer.data.readers import open_dataset
from trainer.data.synthetic import SyntheticSample

__all__ = [
    "AugmentSettings",
    "Dataset",
    "FileSample",
    "Kind",
    "Problem",
    "Report",
    "Sample",
    "SyntheticSample",
    "TrainingSet",
    "check_data",
    "open_dataset",
]

"""The paper's method as a kubeedge/ianvs estimator; the README.md in this folder says how to install it."""
from pathlib import Path

from sedna.common.class_factory import ClassFactory, ClassType

import mdil


@ClassFactory.register(ClassType.GENERAL, alias='BaseModel')
class BaseModel:
    """Learns one domain with each call of `train`.

    Hyperparameters: domains, their names in the order of the calls; classes, the class names for domains that
    are not built into mdil; savedir; and options of mdil.learn, such as num_epochs.
    """

    def __init__(self, domains, classes=None, savedir='mdil', **options):
        self.domains, self.classes, self.savedir = list(domains), classes, Path(savedir)
        self.options, self.state, self.net = options, None, None

    def train(self, train_data, valid_data=None, **_):
        """Learns the next domain; validates on the training pairs without valid_data. Returns the checkpoint's path."""
        known = self.net.domains if self.net else []
        domain = self.domains[len(known)]
        declared = {name: self.savedir / name / f'{name}.json' for name in known}
        record = mdil.learn(
            domain, pairs(train_data), pairs(valid_data or train_data), classes=self.classes, state=self.state,
            data={name: file for name, file in declared.items() if file.exists()}, savedir=self.savedir / domain,
            **self.options)
        self.load(record.best)
        return str(self.state)

    def predict(self, data, **_):
        """Class indices (1, H, W) for each image, from the branch of the domain detected from it."""
        return [found.labels.numpy()[None] for found in self.net.predict([image_of(sample) for sample in data])]

    def evaluate(self, data, metric, **_):
        """The value of the metric (name, function) for the labels and the predictions."""
        _, function = metric
        return function(data.y, self.predict(data.x))

    def save(self, model_path=None):
        """Writes the network to `model_path` if that is given; returns the path of its file."""
        if model_path:
            self.net.save(model_path, overwrite=True)
        return str(model_path or self.state)

    def load(self, model_url, **_):
        self.state, self.net = model_url, mdil.load(model_url, device=self.options.get('device', 'auto'))


def image_of(sample):
    """The path of a sample's image; a sample is that path, or a sequence that starts with it (depth comes second)."""
    return sample if isinstance(sample, str) else str(sample[0]).rstrip()


def pairs(data):
    return [(image_of(sample), str(label).rstrip()) for sample, label in zip(data.x, data.y)]

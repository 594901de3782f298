"""The quickstart in a minute: a tenth of the data, the same path. Proves no quality."""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.dataset_options.num_train = 1000
    config.dataset_options.num_validation = 200
    config.dataset_options.num_test = 200
    config.plain.num_epochs = 4.0
    config.control.num_epochs = 1.0
    config.guided.num_epochs = 1.0
    config.log_every = 5
    return config

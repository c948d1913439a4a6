import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread():
    """The tensors here are tiny: on a busy machine threads that wait for each other cost ten times the work itself."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)

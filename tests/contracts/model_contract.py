"""What the loop relies on in every model: inherit, make one, done."""

import copy
import pickle
from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor, nn

SIZES = [(64, 64), (65, 97), (33, 128)]


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(batch * height + width)
    return torch.randn(batch, 3, height, width, generator=generator)


class ModelContract(ABC):
    """Tests of a model made by `make`; inherit as `class TestX(ModelContract)`."""

    @abstractmethod
    def make(self, num_classes: int) -> nn.Module:
        """Return a model with its initial weights."""

    @pytest.fixture(autouse=True)
    def _few_threads(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def model(self) -> nn.Module:
        """Away from its initialisation, where zeros may hide that something is not connected."""
        model = self.make(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model.eval()

    @pytest.mark.parametrize("size", SIZES)
    def test_logits_have_the_size_of_the_image(self, model, size):
        with torch.no_grad():
            logits = model(images(*size, batch=1))
        assert logits.shape == (1, 5, *size)
        assert logits.isfinite().all()

    @pytest.mark.parametrize("num_classes", [2, 7])
    def test_one_logit_a_class(self, num_classes):
        with torch.no_grad():
            assert self.make(num_classes).eval()(images()).shape[1] == num_classes

    def test_gradients_reach_every_parameter(self, model):
        model(images()).square().mean().backward()
        unreached = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is None
            or not parameter.grad.isfinite().all()
            or not parameter.grad.any()
        ]
        assert unreached == []

    def test_a_training_step_lowers_the_loss(self, model):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        batch, target = images(), torch.randint(5, (2, 64, 64))
        losses = []
        for _ in range(2):
            torch.manual_seed(1)  # the same dropout, so that only the update differs
            loss = nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]

    @pytest.mark.parametrize("size", [(32, 32), (32, 45)])
    def test_trains_on_one_image_of_the_smallest_size(self, model, size):
        model.train()
        logits = model(images(*size, batch=1))
        assert logits.shape == (1, 5, *size)
        logits.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert all(buffer.isfinite().all() for buffer in model.buffers())

    def test_the_global_seed_decides_training_mode(self, model):
        model.train()

        def draw(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return model(images()).detach()

        first = draw(3)
        assert torch.equal(draw(3), first)
        assert not torch.equal(draw(4), first)

    def test_two_forwards_before_one_backward(self, model):
        first, second = images(), images(96, 64)
        model(second).sum().backward()
        alone = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        outputs = model(first), model(second)
        (0 * outputs[0].sum() + outputs[1].sum()).backward()
        for parameter, expected in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)

    def test_eval_mode_repeats_itself_and_changes_nothing(self, model):
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            first, second = model(images()), model(images())
        assert torch.equal(first, second)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())

    def test_images_do_not_influence_each_other_in_eval_mode(self, model):
        batch = images()
        with torch.no_grad():
            torch.testing.assert_close(model(batch)[:1], model(batch[:1]), rtol=1e-4, atol=1e-4)

    def test_state_dict_round_trip(self, model):
        other = self.make(5).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(other(images()), model(images()))

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["copy", "pickle"],
    )
    def test_a_copy_computes_the_same(self, model, duplicate):
        with torch.no_grad():
            expected = model(images())  # before copying: a forward may not leave anything behind
            assert torch.equal(duplicate(model)(images()), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_on_the_cpu(self, model, dtype):
        model.train()
        with torch.autocast("cpu", dtype):
            logits = model(images())
        logits.float().square().mean().backward()
        assert logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype):
            low = model(images()).float()
        with torch.no_grad():
            full = model(images())
        assert (low - full).norm() / full.norm() < 0.05

    def test_channels_last_gives_the_same(self, model):
        with torch.no_grad():
            expected = model(images())
            model.to(memory_format=torch.channels_last)
            found = model(images().to(memory_format=torch.channels_last))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_the_head_is_all_that_is_not_the_encoder(self, model):
        encoder = tuple(f"{part}." for part in getattr(model, "encoder_parts", ("encoder",)))
        for name, _ in model.named_parameters() if hasattr(model, "head_parts") else ():
            assert name.startswith(model.head_parts) != name.startswith(encoder)

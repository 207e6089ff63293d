"""The nonsense itself: wild enough, the same for the same seed, and judged rightly."""

from conclave.protos import gateway_pb2, generation_pb2

from .fuzz import GATEWAY, WORKER, nonsense, wild_messages


def test_every_method_is_reached() -> None:
    reached = {method.path.rpartition("/")[2] for method, _ in nonsense(GATEWAY, 200, seed=1)}
    assert reached == {
        each.name for each in gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods
    }
    assert "Drain" not in {method.path.rpartition("/")[2] for method in WORKER}


def test_wild_messages_are_messages_and_set_deep_fields() -> None:
    kind = gateway_pb2.GatewayGenerateRequest
    messages = [kind.FromString(each) for each in wild_messages(kind, 100, seed=1)]
    assert any(each.request.sampling.HasField("temperature") for each in messages)
    assert any(each.HasField("ensemble") for each in messages)
    assert len({each.SerializeToString(deterministic=True) for each in messages}) > 50


def test_the_same_seed_makes_the_same_nonsense() -> None:
    first, again = (list(nonsense(GATEWAY, 60, seed=3)) for _ in range(2))
    assert first == again


def test_tokens_are_few() -> None:
    kind = generation_pb2.SamplingParams
    most = (kind.FromString(each).max_tokens for each in wild_messages(kind, 100, seed=2))
    assert set(most) <= {0, 1, 8, 2**32 - 1}

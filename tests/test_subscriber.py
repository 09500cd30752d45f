"""A subscription's account: every window of a session once, as a prediction or inside one gap."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pipeline.errors import ConfigError
from pipeline.steps import Gap
from pipeline.subscriber import MISSED, Subscription, subscribe
from pipeline.transport import ZmqBus, endpoint_path, load_curve_server, make_curve_keys
from tests.rigs import short_folder
from tests.test_link import free_port
from tests.test_summary import prediction


def test_every_index_comes_once_or_lies_in_one_gap() -> None:
    with short_folder() as folder, ZmqBus(Path(folder), "fusion") as bus:
        publisher = bus.publisher("fusion")
        with Subscription(endpoint_path(folder, "fusion")) as subscription:
            got: list[tuple[str, int]] = []
            while not got:  # until it is joined
                publisher.publish_json("prediction", msgspec.json.encode(prediction(10)))
                got += [(p.session, p.window.index) for p in subscription.receive(20)]
            before = subscription.repeated
            for session, index in (("s", 11), ("s", 11), ("s", 14), ("s", 12), ("t", 3), ("t", 5), ("t", 6)):
                sent = msgspec.structs.replace(prediction(index), session=session)
                publisher.publish_json("prediction", msgspec.json.encode(sent))
            while len(got) < 6:
                got += [(p.session, p.window.index) for p in subscription.receive(1000)]
            assert got == [("s", 10), ("s", 11), ("s", 14), ("t", 3), ("t", 5), ("t", 6)]
            assert subscription.repeated >= before + 2
            assert subscription.gaps == [Gap(12, 13, MISSED, "prediction"), Gap(4, 4, MISSED, "prediction")]


def test_a_subscription_from_another_host_needs_both_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both or not at all"):
        Subscription("tcp://127.0.0.1:5599", key=tmp_path / "me.key_secret")
    public = {name: make_curve_keys(tmp_path, name)[0] for name in ("hub", "me")}
    own = load_curve_server(tmp_path / "hub.key_secret", [public["me"]])
    address = f"tcp://127.0.0.1:{free_port()}"
    with short_folder() as folder, ZmqBus(Path(folder), "fusion") as bus:
        publisher = bus.publisher("fusion", tcp=address, curve=own)
        with subscribe(address, key=tmp_path / "me.key_secret", hub_key=public["hub"]) as subscription:
            got: list[int] = []
            while not got:
                publisher.publish_json("prediction", msgspec.json.encode(prediction(10)))
                got += [p.window.index for p in subscription.receive(20)]
    assert got[0] == 10


def test_a_listener_and_the_session_are_told_that_it_is_refused(tmp_path: Path) -> None:
    public = {name: make_curve_keys(tmp_path, name)[0] for name in ("hub", "me")}
    address = f"tcp://127.0.0.1:{free_port()}"
    with short_folder() as folder, ZmqBus(Path(folder), "fusion") as bus:
        bus.publisher("fusion", tcp=address, curve=load_curve_server(tmp_path / "hub.key_secret", [public["hub"]]))
        with subscribe(address, key=tmp_path / "me.key_secret", hub_key=public["hub"]) as subscription:
            with pytest.raises(RuntimeWarning, match=r"refuses the key .*me.key_secret"):
                list(subscription)
            while not bus.refusals():
                subscription.receive(20)
        assert "is none of those in `curve: allow`" in bus.refusals()[0]
        with subscribe(address) as plain:
            while not plain.refusal or len(bus.refusals()) < 2:
                plain.receive(20)
            assert "asks for keys" in plain.refusal
        assert "somebody without keys" in bus.refusals()[1]


def test_an_address_that_is_taken_or_given_up_leaves_a_bus_that_can_be_closed() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with short_folder() as folder, ZmqBus(Path(folder), "fusion") as bus:
        publisher = bus.publisher("fusion", tcp=address)
        with pytest.raises(ConfigError, match="is another program using it"):
            bus.publisher("other", tcp=address)
        publisher.close()
        assert bus.refusals() == []


@pytest.mark.parametrize("endpoint", [None, 5599, Path("/tmp/x.sock")])
def test_an_endpoint_is_a_text(endpoint: object) -> None:
    with pytest.raises(ConfigError, match="an endpoint is a text like"):
        subscribe(endpoint)  # type: ignore[arg-type]

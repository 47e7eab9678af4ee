"""Our rounds in somebody else's ServerApp, and our client in somebody else's ClientApp."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp import Grid, ServerApp

from fedkd.simulations.client_app import add_client, make_client_app
from fedkd.simulations.grid import run_grid
from fedkd.simulations.local import LocalGrid
from fedkd.strategies.records import JOB
from tests.conftest import Shared, Tiny

pytestmark = pytest.mark.usefixtures("lean")


def their_client(seen: list[tuple[str, bool]]) -> ClientApp:
    """An app with a function and a mod of its own, and ours beside them."""

    def spy(message: Message, context: Context, call_next: Any) -> Message:
        job = message.content.config_records.get(JOB, ConfigRecord())
        seen.append((message.metadata.message_type, "config" in job))
        return call_next(message, context)

    app = ClientApp(mods=[message_size_mod])

    @app.query("count")
    def count(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return Message(RecordDict({"count": MetricRecord({"n": number})}), reply_to=message)

    return add_client(app, [arrays_size_mod, spy])


def context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def test_our_rounds_are_a_call_in_a_server_app_and_its_own_messages_go_on(
    tiny: Tiny, shared: Shared
) -> None:
    app, seen, found = ServerApp(), [], {}  # type: ignore[var-annotated]

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        found["run"] = run_grid(tiny(), grid)
        asked = [Message(RecordDict(), node, "query.count") for node in grid.get_node_ids()]
        replies = grid.send_and_receive(asked)
        found["counts"] = sorted(reply.content["count"]["n"] for reply in replies)

    app(LocalGrid(their_client(seen), 3), context())
    ours = shared().read_json("summary.json")["hash"]
    assert found["run"].read_json("summary.json")["hash"] == ours
    assert found["counts"] == [0, 1, 2]
    # Mods of the four see them alone, each with its whole job although that travels once.
    assert {kind for kind, _ in seen} == {"query.describe", "train", "query.knowledge", "evaluate"}
    assert all(whole for _, whole in seen)


@pytest.mark.parametrize(
    "mod", [fixedclipping_mod, secaggplus_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)]
)
def test_mods_of_model_updates_are_refused_by_name(mod: Any) -> None:
    with pytest.raises(ValueError, match=r"(fixedclipping_mod|secaggplus_mod|LocalDpMod) is made"):
        make_client_app([mod])


def test_an_app_that_trains_already_is_refused() -> None:
    app = ClientApp()
    app.train()(lambda message, context: message)
    with pytest.raises(ValueError, match=r'"train" .*|already registered.*@app.train\("mine"\)'):
        add_client(app)

"""The locust file: one user class and one shape for every scenario.

    locust -f lt_sglang/bench/locustfile.py --host URL --lt-scenario FILE.yaml [--lt-case NAME]
           [--lt-out FOLDER] [--headless]

Without --headless, locust's web page starts and stops runs. How many users there are and when a run ends is
the scenario's business. Exit code 1: a gate was broken.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, LoadTestShape, events, task
from locust.contrib.fasthttp import FastHttpSession
from locust.event import EventHook
from locust.runners import LocalRunner

from lt_sglang.bench.fill import fitted
from lt_sglang.bench.outcome import finish
from lt_sglang.bench.scenario_file import load_scenarios, pick
from lt_sglang.bench.session import Session
from lt_sglang.errors import LightTransferError

IDLE_SECONDS = 0.2
PROGRESS_SECONDS = 10.0
# Connections one open-loop user may have open.
CONNECTIONS = 4096
GATE_BROKEN = 1
FAILED = 2


class StreamingUser(FastHttpUser):
    """Sends conversations: its own, one after the other, or in open loop everybody's, each when it is due."""

    max_retries = 0
    concurrency = CONNECTIONS

    @task
    def converse(self) -> None:
        """One conversation; nothing if there is none left."""
        session: Session | None = self.environment.lt_session
        # All begin together, also where one of them was there before.
        begun = session is not None and self.environment.runner.user_count >= session.scenario.load.most_users
        conversation = session.take() if session is not None and begun else None
        if session is None or conversation is None:
            gevent.sleep(IDLE_SECONDS)
        elif session.scenario.load.kind == "closed":
            session.play(self.client, conversation)
        else:
            session.wait_for(conversation)
            gevent.spawn(session.play, self.client, conversation)


class ScenarioShape(LoadTestShape):
    """As many users as the scenario says, until everything was answered."""

    _told = 0.0

    def tick(self) -> tuple[int, float] | None:
        """Called once a second."""
        environment = self.runner.environment
        session: Session | None = environment.lt_session
        if session is not None and self.get_run_time() - self._told >= PROGRESS_SECONDS:
            self._told = self.get_run_time()
            print(session.progress(), file=sys.stderr, flush=True)
        if environment.lt_failed or (session is not None and session.over):
            return None
        load = environment.lt_scenario.load
        # How many fit is only known once the server was asked, and locust cuts off users that are too many.
        users = 1 if load.fill and session is None else load.most_users
        return users, users


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    parser.add_argument("--lt-scenario", required=True, help="a scenario file", include_in_web_ui=False)
    parser.add_argument("--lt-case", help="which of its cases", include_in_web_ui=False)
    parser.add_argument("--lt-out", default="loadtest-out", help="folder for what was measured")


@events.init.add_listener
def _read_scenario(environment: Any, runner: Any, **_: Any) -> None:
    if not isinstance(runner, LocalRunner):
        raise SystemExit("a scenario runs in one process: leave --master, --worker and --processes out")
    options = environment.parsed_options
    try:
        scenario = pick(load_scenarios(Path(options.lt_scenario)), options.lt_case)
    except LightTransferError as error:
        raise SystemExit(str(error)) from None
    environment.lt_given = environment.lt_scenario = scenario
    environment.lt_session = None
    environment.lt_failed = False
    StreamingUser.network_timeout = scenario.load.timeout_seconds


@events.test_start.add_listener
def _start(environment: Any, **_: Any) -> None:
    client = FastHttpSession(
        environment.host, EventHook(), None, max_retries=0, network_timeout=StreamingUser.network_timeout
    )
    try:
        environment.lt_scenario = fitted(environment.lt_given, environment.host)
        session = Session(environment.lt_scenario, environment.host, gevent.sleep)
        session.prepare(client)
    except LightTransferError as error:
        logging.error("%s", error)
        environment.process_exit_code = FAILED
        # The shape then ends the run; from the web page the next one can be started.
        environment.lt_failed = True
        return
    environment.process_exit_code = None
    environment.lt_session = session


@events.test_stop.add_listener
def _stop(environment: Any, **_: Any) -> None:
    session, environment.lt_session = environment.lt_session, None
    environment.lt_failed = False
    if session is None:
        return
    session.finish()
    verdicts = finish(session, Path(environment.parsed_options.lt_out))
    environment.process_exit_code = 0 if all(one.passed for one in verdicts) else GATE_BROKEN

"""`upspiral`: the commands, and the one place where an error becomes a line for people and an exit code.

Exit codes: 0 done; 1 `doctor` found something missing, or `template check` a template that cannot be trained on; 2 an
error, which the message explains; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from upspiral import __version__
from upspiral.config.keys import all_keys
from upspiral.config.loader import toml_value
from upspiral.errors import UpspiralError

_DEBUG_FLAG = "--debug"


def main() -> None:
    """The console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. `--debug` anywhere lets errors through as tracebacks."""
    debug = _DEBUG_FLAG in arguments
    try:
        result = make_app()([each for each in arguments if each != _DEBUG_FLAG], result_action="return_value")
    except CycloptsError as error:
        return _fail(str(error))
    except UpspiralError as error:
        if debug:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def make_app() -> App:
    """The command tree."""
    from upspiral.cli.agent import get_agents, list_agents
    from upspiral.cli.doctor import doctor
    from upspiral.cli.engine import install, list_engines
    from upspiral.cli.export import export
    from upspiral.cli.image import build, collect, list_images, remove, show
    from upspiral.cli.model import get, list_models
    from upspiral.cli.plan import plan
    from upspiral.cli.run import run
    from upspiral.cli.sandbox import collect_garbage, list_sandboxes
    from upspiral.cli.sandbox import serve as serve_sandboxes
    from upspiral.cli.serve import serve
    from upspiral.cli.template import check
    from upspiral.cli.view import view

    app = App(
        name="upspiral",
        help="Trains any agent with reinforcement learning, exactly as the agent runs in production.",
        help_epilogue="--debug shows the traceback of an error.",
        version=__version__,
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    app.command(run, help_format="plaintext", help_epilogue=_keys_help())
    app.command(plan, help_format="plaintext")
    app.command(serve)
    app.command(view)
    app.command(export)
    app.command(doctor)
    model = App(name="model", help="Fetch and list models.")
    model.command(get)
    model.command(list_models, name="list")
    app.command(model)
    engine = App(name="engine", help="Install and list the inference servers that runs can start.")
    engine.command(install)
    engine.command(list_engines, name="list")
    app.command(engine)
    template = App(name="template", help="Look at chat templates.")
    template.command(check)
    app.command(template)
    agent = App(name="agent", help="Fetch and list the agents that runs can start.")
    agent.command(get_agents, name="get")
    agent.command(list_agents, name="list")
    app.command(agent)
    image = App(name="image", help="Make, list and remove the images that sandboxes begin with.")
    image.command(build)
    image.command(list_images, name="list")
    image.command(show)
    image.command(remove)
    image.command(collect, name="gc")
    app.command(image)
    sandbox = App(name="sandbox", help="Serve sandboxes, list them, remove what is left of dead ones.")
    sandbox.command(serve_sandboxes, name="serve")
    sandbox.command(list_sandboxes, name="list")
    sandbox.command(collect_garbage, name="gc")
    app.command(sandbox)
    return app


def _keys_help() -> str:
    """The run file's keys as text: cyclopts cannot know them, since they are read by the loader."""
    lines = ["Keys of a run file, each also a flag, with its default:"]
    for key in all_keys().values():
        default = "unset" if key.default is None else toml_value(key.default)
        lines.append(f"  --{key.name} [{default}]  {key.doc}")
    return "\n".join(lines)


def _fail(message: str) -> int:
    print(f"error: {message.strip()}", file=sys.stderr)
    return 2

"""The direction of imports: rooms import rooms below them, and never up."""

import ast
import pathlib

# Every room, and the rooms that it may import.
RECIPES = "horovod_recipes"
ROOMS_BELOW = {
    "keras_lars": set(),
    f"{RECIPES}.errors": set(),
    f"{RECIPES}.install_horovod": set(),
    f"{RECIPES}._groups": set(),
    f"{RECIPES}._quiet": set(),
    f"{RECIPES}._sigterm": set(),
    f"{RECIPES}._xla": set(),
    f"{RECIPES}.configs": {"errors", "data", "models"},
    f"{RECIPES}.data": {"errors", "_quiet"},
    # Synchronized batch norm alone needs the binding.
    f"{RECIPES}.models": {"_xla", "keras"},
    f"{RECIPES}.keras": {"_groups", "_xla", "install_horovod", "keras_lars"},
    f"{RECIPES}.training": {
        "_sigterm",
        "configs",
        "data",
        "errors",
        "keras",
        "keras_lars",
        "models",
    },
    f"{RECIPES}.planning": {
        "_groups",
        "configs",
        "data",
        "errors",
        "keras_lars",
        "models",
        "training",
    },
    f"{RECIPES}.train": {
        "_quiet",
        "_sigterm",
        "configs",
        "errors",
        "install_horovod",
        "keras",
        "training",
    },
    f"{RECIPES}.evaluate": {
        "_quiet",
        "errors",
        "install_horovod",
        "keras",
        "training",
    },
    f"{RECIPES}.plan": {"_quiet", "configs", "errors", "planning"},
}
# The packages import none of the last three.
PROJECT = ("keras_lars", RECIPES, "benchmarks", "examples", "tests")
# Both packages share the first three, and rooms or commands the others.
SHARED_PRIVATE = (
    "keras_lars._files",
    "keras_lars._unwrap",
    "keras_lars._xla_flags",
    f"{RECIPES}._groups",
    f"{RECIPES}._quiet",
    f"{RECIPES}._sigterm",
    f"{RECIPES}._xla",
    # The list of recipes is the files without an underscore.
    f"{RECIPES}.configs._",
)


def imports():
    """Yields pairs of modules of this project: the first imports the second."""
    for package in ("keras_lars", RECIPES):
        for path in pathlib.Path(package).rglob("*.py"):
            module = ".".join(path.with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{a.name}" for a in node.names]
                for name in names:
                    if name.split(".")[0] in PROJECT:
                        yield module, name


def room_of(module):
    """Returns the room of a module of this project."""
    rooms = [
        room
        for room in ROOMS_BELOW
        if module == room or module.startswith(f"{room}.")
    ]
    assert rooms, f"{module} is in no room: add it to ROOMS_BELOW"
    return rooms[0]


def below(room):
    return {
        name if name == "keras_lars" else f"{RECIPES}.{name}"
        for name in ROOMS_BELOW[room]
    }


def test_imports_go_down():
    pairs = list(imports())
    assert len(pairs) > 100
    for module, name in pairs:
        room = room_of(module)
        assert room_of(name) in {room} | below(room), f"{module}: {name}"


def test_private_modules_stay_in_their_room():
    for module, name in imports():
        if room_of(name) == room_of(module) or name.startswith(SHARED_PRIVATE):
            continue
        private = [part for part in name.split(".") if part.startswith("_")]
        assert not private, f"{module}: {name}"


def test_rooms_have_no_cycle():
    left = set(ROOMS_BELOW)
    while left:
        ground = {room for room in left if not below(room) & left}
        assert ground, f"a cycle among {sorted(left)}"
        left -= ground

"""Worlds of Box2D: rebuilt in a replica once an episode, then brought from state to state by the bytes that a step reads.

Bodies, fixtures, joints and contacts come in the order of the original's, as the solver goes through them in it, and the
broad phase knows them by the same boxes: a replica steps bit for bit as the original does.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any, NamedTuple

from sb3_bridge.clones.box2d_memory import (
    FLAGS,
    JOINT,
    JOINTS,
    MANIFOLD,
    MASS,
    MOTION,
    PARTS,
    SETTINGS,
    Body,
    Place,
    World,
    address,
    as_proxy,
    make_shape,
    pointer,
    read,
    read_shape,
    read_world,
    verify,
    write,
)
from sb3_bridge.clones.copying import BASES, Memo, Unclonable, copy_value


class _State:
    """A world in a snapshot; ``data`` are the user's objects in it, by place."""

    def __init__(self, number: int, content: World):
        self.number, self.content = number, content
        self.data: dict[Place, Any] = {}


class _Live:
    """The world of a replica."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._proxies: dict[tuple[Any, int], Any] = {}  # what pybox2d has, by kind and address
        self._start()

    def _start(self) -> None:
        self.world: Any = sys.modules["Box2D"].b2World()
        self.content = read_world(self.world, self._known)

    def proxy(self, place: Place) -> Any:
        """What pybox2d has for a place, as the world is now."""
        if not place:
            return self.world
        kind, number, *more = place
        if kind == "joint":
            at, kind = self.content.joints[number].at, self.content.joints[number].made[0]
        else:
            body = self.content.bodies[number]
            at = body.fixtures[more[0]] if more else body.at
        if (kind, at) not in self._proxies:
            for body in self.world.bodies:
                self._proxies["body", address(body)] = body
                self._proxies |= {("fixture", address(fixture)): fixture for fixture in body.fixtures}
            self._proxies |= {(joint.type, address(joint)): joint for joint in self.world.joints}
        return self._proxies[kind, at]

    def restore(self, wanted: World) -> None:
        """Brings the world to a state, but for the user's objects."""
        for name in ("contactListener", "contactFilter", "destructionListener"):
            if getattr(self.world, name) is not None:  # they are restored beside; nothing of this is their business
                setattr(self.world, name, None)
        self._rebuild(wanted)
        manager, content = self.world.contactManager, self.content
        start, pairs = address(manager), list(zip(content.bodies, wanted.bodies, strict=True))
        for number, (body, want) in enumerate(pairs):
            if want.made[0] or body.motion != want.motion:
                x, y, angle = struct.unpack("2f36xf", want.motion[12:60])
                self.proxy(("body", number)).transform = (x, y), angle
        nodes, tree = [node for body in content.bodies if body.made[0] for node in body.nodes], pointer(start + 8)
        for node, box in zip(nodes, wanted.boxes, strict=True):
            if read(tree + 40 * node, 16) != box:
                self._move(node, (1e9, 1e9, 1e9, 1e9))  # a box that holds another one would stay as it is
                self._move(node, struct.unpack("4f", box))
                write(tree + 40 * node, box, 16)
        for contact in self.world.contacts:
            manager.Destroy(contact)
        for number, (body, want) in enumerate(pairs):
            for i in range(len(body.fixtures) if want.made[0] else 0):  # what was made since the last step is looked for
                self.proxy(("fixture", number, i)).Refilter()
        for (one, child, two, other), flags, manifold in wanted.contacts:
            sides = [content.bodies[number].fixtures[i] for _, number, i in (one, two)]
            manager.AddPair(as_proxy(sides[0], child), as_proxy(sides[1], other))
            at = pointer(start + 88)
            if not at or struct.unpack("QQii", read(at + 96, 24)) != (*sides, child, other):
                raise Unclonable("a contact cannot be made anew in a copy of its world")
            write(at + FLAGS.start, flags, len(flags))
            write(at + MANIFOLD.start, manifold, len(manifold))
        for body, want in pairs:
            if want.made[0] or body.motion != want.motion or body.mass != want.mass:
                write(body.at + MOTION.start, want.motion, len(want.motion))
                write(body.at + MASS.start, want.mass, len(want.mass))
        for mine, theirs in zip(content.joints, wanted.joints, strict=True):
            write(mine.at + JOINT, theirs.state, len(theirs.state))
        for part, setting in zip(SETTINGS, wanted.settings, strict=True):
            write(start + part.start, setting, len(setting))

    def _rebuild(self, wanted: World) -> None:
        """Makes bodies, fixtures and joints as they are wanted; the oldest ones are kept where they are alike."""
        mine = self.content = read_world(self.world, self._known)
        n_bodies, n_joints = _n_alike(mine.bodies, wanted.bodies), _n_alike(mine.joints, wanted.joints)
        sizes = (len(wanted.bodies), len(wanted.joints), wanted.is_filtered)
        if (n_bodies, n_joints) == (len(mine.bodies), len(mine.joints)) == sizes[:2] and mine.is_filtered <= sizes[2]:
            return
        # A new world numbers what it gets as the original did when that was new; and has the filter of all worlds.
        if 2 * n_bodies < len(wanted.bodies) or mine.is_filtered > wanted.is_filtered:
            self._start()
            mine, n_bodies, n_joints = self.content, 0, 0
        lost = [number for number, joint in enumerate(mine.joints) if max(joint.made[1:3]) >= n_bodies]
        n_joints = min([n_joints, *lost])
        for number in reversed(range(n_joints, len(mine.joints))):
            self.world.DestroyJoint(self.proxy(("joint", number)))
        for number in reversed(range(n_bodies, len(mine.bodies))):
            self.world.DestroyBody(self.proxy(("body", number)))
        self._make_bodies(wanted.bodies[n_bodies:])
        box2d, bodies = sys.modules["Box2D"], self.world.bodies
        for kind, one, two, collide in [joint.made for joint in wanted.joints[n_joints:]]:
            make = getattr(box2d, f"b2{JOINTS[kind]}JointDef")
            self.world.CreateJoint(make(bodyA=bodies[one], bodyB=bodies[two], collideConnected=collide))
        self._proxies.clear()
        self.content = read_world(self.world, self._known)

    def _make_bodies(self, wanted: list[Body]) -> None:
        fixtures = []
        for want in wanted:
            x, y, angle = struct.unpack("2f36xf", want.motion[12:60])
            is_active, nodes, latest = bool(want.made[1]), iter(want.nodes), 0
            body = self.world.CreateBody(type=want.made[0], active=is_active, position=(x, y), angle=angle)
            for made in want.made[2]:
                latest = max(latest, next(nodes, 0))
                fixtures.append((latest, len(fixtures), body, made))
        # Contacts that begin together are sorted by the numbers of nodes, which follow this order.
        for _, _, body, (*parts, made) in sorted(fixtures, key=lambda one: one[:2]):
            shape: Any = make_shape(made)
            at = address(body.CreateFixture(sys.modules["Box2D"].b2FixtureDef(shape=shape)))
            shape.thisown = True  # the fixture has a copy; pybox2d would never free this one
            for part, content in zip(PARTS, parts, strict=True):
                write(at + part.start, content, len(content))

    def _move(self, node: int, box: tuple[float, ...]) -> None:
        left, low, right, high = box  # Box2D adds a tenth on each side
        ends = {"lowerBound": (left + 0.1, low + 0.1), "upperBound": (right - 0.1, high - 0.1)}
        self.world.contactManager.broadPhase.MoveProxy(node, sys.modules["Box2D"].b2AABB(**ends), (0, 0))


def _n_alike(mine: list[Any], wanted: list[Any]) -> int:
    pairs = zip(mine, wanted, strict=False)
    return next((i for i, (one, two) in enumerate(pairs) if one.made != two.made), min(len(mine), len(wanted)))


def worlds_of(env: Any) -> list[Any]:
    """The worlds among an environment's attributes, and among those of its attributes."""
    box2d: Any = sys.modules.get("Box2D")  # loaded by whoever made one
    if box2d is None:
        return []
    held = list(vars(env).values())
    held += [value for one in held if hasattr(one, "__dict__") and not isinstance(one, type) for value in vars(one).values()]
    return list({address(one): one for one in held if isinstance(one, box2d.b2World)}.values())


def begin(env: Any, memo: Memo, known: dict[int, Any]) -> None:
    """Tells the copiers of this module what stands where in an environment's worlds.

    Raises:
      Unclonable: a world that cannot be rebuilt.
    """
    verify()
    states = {}
    for number, world in enumerate(worlds_of(env)):
        states[address(world)] = state = _State(number, read_world(world, known)), ()
        states |= {at: (state[0], place) for at, place in state[0].content.places.items()}
    memo["box2d"] = states
    for state, place in list(states.values()):
        if not place:
            data = [(where, ctypes.cast(at, ctypes.py_object).value) for where, at in state.content.data() if at]
            state.data = {where: copy_value(value, memo) for where, value in data}


class _Part:
    """An object of pybox2d in a snapshot: it stands for a part of a world, or for nothing, or is a callback."""

    __slots__ = ("attributes", "kind", "place", "state")

    def __init__(self, kind: type, state: _State | None, place: Place):
        self.kind, self.state, self.place = kind, state, place
        self.attributes: dict[str, Any] = {}


def _part(value: Any, memo: Memo) -> Any:
    # What is in no world was destroyed: its copy stands for nothing, and cannot be used by mistake.
    state, place = memo["box2d"].get(address(value), (None, ())) if "box2d" in memo else (None, ())
    if state is None and ("box2d" not in memo or isinstance(value, sys.modules["Box2D"].b2World)):
        raise Unclonable("its b2World is neither an attribute of the environment nor of one of its attributes")
    return _with_attributes(_Part(type(value), state, place), value, memo)


def _callback(value: Any, memo: Memo) -> Any:
    return _with_attributes(_Part(type(value), None, ("callback",)), value, memo)


def _with_attributes(part: _Part, value: Any, memo: Memo) -> _Part:
    memo[id(value)] = part
    part.attributes.update({name: copy_value(one, memo) for name, one in vars(value).items() if name != "this"})
    return part


def _restored_part(part: _Part, memo: Memo) -> Any:
    kind, state, place = part.kind, part.state, part.place
    live = None if state is None else memo.get(id(state)) or _restored_world(state, memo)
    if id(part) in memo:  # the user's objects in a world may refer to it
        return memo[id(part)]
    result: Any = kind.__new__(kind) if live is None or place else live.world
    memo[id(part)] = result
    if place == ("callback",):
        next(base for base in kind.__mro__ if base.__module__.startswith("Box2D")).__init__(result)  # type: ignore[misc]
    elif live is not None and place:
        result.this = live.proxy(place).this
    vars(result).update({name: copy_value(value, memo) for name, value in part.attributes.items()})
    if live is not None and not place:
        for name, callback in list(vars(result)["_b2World__data"].items()):
            setattr(result, _CALLBACKS[name], callback)
    return result


_CALLBACKS = {
    "contact": "contactListener",
    "contactfilter": "contactFilter",
    "destruction": "destructionListener",
    "renderer": "renderer",
}


def _restored_world(state: _State, memo: Memo) -> _Live:
    lives = memo["kept"].setdefault("box2d", {})
    if state.number not in lives:
        lives[state.number] = _Live()
    live = memo[id(state)] = lives[state.number]
    live.restore(state.content)
    for place, at in live.content.data():
        if at or place in state.data:
            live.proxy(place).userData = copy_value(state.data.get(place), memo)
    return live


class _Definition(NamedTuple):
    """A shape or a definition of a fixture, of an environment's own."""

    at: int
    shape: Any
    values: dict[str, Any]


_VALUES = ("friction", "restitution", "density", "isSensor", "categoryBits", "maskBits", "groupIndex", "userData")


def _definition(value: Any, memo: Memo) -> Any:
    shape = None if value.shape is None else read_shape(address(value.shape))[0]
    return _Definition(address(value), shape, {name: copy_value(getattr(value, name), memo) for name in _VALUES})


def _restored_definition(part: _Definition, memo: Memo) -> Any:
    # pybox2d never frees a definition's shape: a replica keeps what it has.
    kept = memo["kept"].setdefault("definitions", {})
    if part.at not in kept:
        kept[part.at] = sys.modules["Box2D"].b2FixtureDef()
    result = kept[part.at]
    if part.shape is not None and (result.shape is None or read_shape(address(result.shape))[0] != part.shape):
        if result.shape is not None:
            result.shape.thisown = True
        result.shape = make_shape(part.shape)
    for name, value in part.values.items():
        setattr(result, name, copy_value(value, memo))
    return result


def _refuse(value: Any, memo: Memo) -> Any:
    raise Unclonable(f"a {type(value).__name__} of Box2D cannot be copied")


def register() -> None:
    """Tells how objects of Box2D are copied, once it is loaded."""
    box2d: Any = sys.modules.get("Box2D")
    if box2d is None or _Part in BASES:
        return
    copiers: dict[Any, Any] = dict.fromkeys((box2d.b2World, box2d.b2Body, box2d.b2Fixture, box2d.b2Joint), _part)
    copiers |= {kind: _callback for kind in vars(box2d).values() if hasattr(kind, "__disown__")}
    copiers |= {box2d.b2Draw: lambda value, memo: None, box2d.b2FixtureDef: _definition}
    copiers |= dict.fromkeys((box2d.b2Vec2, box2d.b2Vec3), lambda value, memo: value.copy())
    for kind in vars(box2d).values():
        if isinstance(kind, type) and kind.__module__.startswith("Box2D"):
            BASES[kind] = next((copiers[base] for base in kind.__mro__ if base in copiers), _refuse)
    BASES[_Part], BASES[_Definition] = _restored_part, _restored_definition

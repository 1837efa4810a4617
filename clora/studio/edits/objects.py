"""Edits of single objects and of the background behind them."""

from dataclasses import replace

from clora.studio.edits.registry import Outcome, Source, new_families
from clora.studio.scenes import (
    KINDS,
    Shape,
    draw,
    random_pattern,
    random_thing,
    recoloured,
    render,
)

FAMILIES, edit = new_families()


@edit(
    "make the {a} {b}",
    "change the {a} to {b}",
    "paint the {a} {b}",
    "turn the {a} {b}",
    "recolour the {a} in {b}",
    of_objects=True,
    share=2.0,
)
def recolour(source: Source) -> Outcome:
    objects = list(source.scene.objects)
    i = int(source.rng.integers(len(objects)))
    name = objects[i].name
    colour = source.colour(objects[i].colour or "")
    objects[i] = recoloured(objects[i], colour)
    return source.with_objects(objects), name, colour


@edit(
    "remove the {a}",
    "delete the {a}",
    "take the {a} away",
    "erase the {a}",
    "get rid of the {a}",
    of_objects=True,
    share=1.6,
)
def remove(source: Source) -> Outcome:
    objects = list(source.scene.objects)
    gone = objects.pop(int(source.rng.integers(len(objects))))
    return source.with_objects(objects), gone.name, ""


@edit(
    "make the background {a}",
    "change the background to {a}",
    "put everything on a {a} background",
    "replace the backdrop with plain {a}",
    of_objects=True,
    share=1.6,
)
def background(source: Source) -> Outcome:
    colour = source.colour(*source.scene.background.colours)
    plain = replace(random_pattern(source.rng, colour), noise=0.0)
    return render(replace(source.scene, background=plain), source.size), colour, ""


@edit("add a {a} in the {b} corner", "put a {a} at the {b}", "draw a {a} on the {b}", share=1.5)
def add_shape(source: Source) -> Outcome:
    row, column = (source.one_of(sides) for sides in (("top", "bottom"), ("left", "right")))
    centre = (16.0 if column == "left" else 48.0, 16.0 if row == "top" else 48.0)
    # A colour that nothing in the scene has, by which the new shape shows and its name stays its own.
    taken = [thing.colour for thing in source.scene.objects if thing.colour]
    colour = source.colour(*source.scene.background.colours, *taken)
    shape = Shape(source.one_of(KINDS), colour, centre, 11.0, 0.0, 0.1)
    return draw(source.image, shape), shape.name, f"{row} {column}"


@edit("add one {a}", "place the picture of a {a} in it", "show a {a} too", random=True, share=0.5)
def add_thing(source: Source) -> Outcome:
    cutouts = source.photographs.cutouts("train")
    noun = source.one_of(tuple(sorted({cutout.noun for cutout in cutouts})))
    return draw(source.image, random_thing(source.rng, cutouts, noun)), noun, ""

"""Toy roads: drawn street scenes of three countries in the folder layouts of the real data sets.

    python -m datasets.toy_roads --out DIR [--train 96 --val 24 --height 128 --width 256 --seed 0]

writes `cityscapes/` (Germany), `bdd100k/` (USA) and `IDD_Segmentation/` (India) below DIR, enough
to run every script of the project without the real data. A scene is a street in metres, seen
through a pinhole camera and painted back to front. Label image and polygon file come from the
outlines that the picture was painted with. The countries differ in light, colours, road edge,
traffic, and in the classes that exist at all, so that a network trained on one fails on the next.
"""
import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets.labels import label_table

VERSION = 1  # of the drawings: raised when the same request gives other pictures
COUNTRIES = {'germany': 'cityscapes', 'usa': 'bdd100k', 'india': 'IDD_Segmentation'}
SPLITS = ('train', 'val')
# Classes whose distance follows from the image row: above the horizon 0, below it the ground's.
BY_ROW = ('sky', 'road', 'sidewalk', 'terrain', 'non-drivable fallback', 'drivable fallback', 'curb')
# Strength of the fine and of the blotchy texture of a class, in percent.
TEXTURE = {'road': (5, 7), 'sidewalk': (5, 6), 'terrain': (16, 22), 'vegetation': (20, 30),
           'non-drivable fallback': (9, 20), 'drivable fallback': (9, 14), 'building': (3, 7),
           'wall': (6, 14), 'fence': (7, 8), 'static': (12, 20), 'unlabeled': (22, 35),
           'animal': (5, 12), 'obs-str-bar-fallback': (12, 20), 'sky': (0, 0)}


def ring(x, y, width, height=None, corners=12, turn=0.0):
    """Outline of an ellipse with half axes `width`, `height`; few corners give signs' shapes."""
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + width * math.sin(a), y + (height or width) * math.cos(a)) for a in angles]


# Upright figures: (colour, outline in metres) in painter's order.
WALKERS = [[('trousers', [(-.2 - s, 0), (-.06 - s, 0), (.02, .9), (-.2, .9)]),
            ('trousers', [(.06 + s, 0), (.2 + s, 0), (.2, .9), (-.02, .9)]),
            ('shirt', [(-.22, .85), (.22, .85), (.27, 1.47), (-.27, 1.47)]),
            ('sleeve', [(-.38, .8), (-.26, .8), (-.2, 1.45), (-.29, 1.45)]),
            ('sleeve', [(.26, .8), (.38, .8), (.29, 1.45), (.2, 1.45)]),
            ('skin', ring(0, 1.63, .12, .16)), ('hair', ring(0, 1.71, .13, .09))]
           for s in (0.0, .12, .25)]
RIDER = [('trousers', [(-.3, 1.05), (.0, 1.0), (.34, .72), (.2, .3), (.02, .3), (.12, .68)]),
         ('shirt', [(-.34, .95), (.02, .92), (.32, 1.46), (.0, 1.54)]),
         ('sleeve', [(.1, 1.42), (.24, 1.4), (.6, 1.05), (.5, .97)]),
         ('skin', ring(.22, 1.62, .12, .14)), ('hair', ring(.2, 1.72, .15, .13))]
BICYCLE = [('tyre', ring(-.54, .35, .36)), ('spokes', ring(-.54, .35, .27)),
           ('tyre', ring(.54, .35, .36)), ('spokes', ring(.54, .35, .27)),
           ('paint', [(-.56, .3), (-.26, .88), (.38, .9), (.6, .33), (.48, .3), (.3, .76),
                      (.02, .3)]),
           ('tyre', [(.3, .85), (.42, 1.08), (.62, 1.06), (.4, .85)])]
MOTORCYCLE = [('tyre', ring(-.62, .33, .34)), ('spokes', ring(-.62, .33, .16)),
              ('tyre', ring(.66, .33, .34)), ('spokes', ring(.66, .33, .16)),
              ('tyre', [(-.5, .3), (-.4, .62), (.4, .62), (.3, .24), (-.2, .2)]),
              ('paint', [(-.95, .72), (-.2, .58), (.5, .5), (.62, .8), (.45, 1.02), (.1, .98),
                         (-.1, .85), (-.85, .88)]),
              ('tyre', [(-.7, .84), (-.08, .84), (-.05, .95), (-.65, .97)]),
              ('lamp', ring(.62, .86, .1))]
COW = [('hide', [(x, 0), (x + .14, 0), (x + .18, .8), (x - .04, .8)]) for x in (-.8, -.58, .4, .58)]
COW += [('hide', [(-.95, .7), (-.9, 1.36), (-.2, 1.3), (.55, 1.42), (.82, 1.2), (.7, .7)]),
        ('hide', [(.66, 1.15), (.85, 1.55), (1.1, 1.5), (1.36, 1.14), (1.22, 1.0), (.9, 1.1)]),
        ('spot', ring(-.35, 1.1, .26, .16)), ('horn', [(.9, 1.5), (.95, 1.75), (1.0, 1.5)])]

# Vehicles are boxes: width, height, length, height above ground, distance from the rear, inset of
# the top, colour, and marks on the faces towards us (face, u0, v0, u1, v1 in parts, colour).
LAMPS = [('end', .03, .5, .2, .8, 'lamp'), ('end', .8, .5, .97, .8, 'lamp')]
PLATE = [('end', .36, .25, .64, .48, 'plate')]
CAR_BODY = LAMPS + PLATE + [('end', 0, 0, 1, .16, 'tyre'), ('side', 0, 0, 1, .12, 'tyre'),
                            ('side', .52, .2, .54, 1, 'tyre')]
CAR_GLASS = [('end', .07, .08, .93, .86, 'glass'), ('side', .07, .08, .47, .86, 'glass'),
             ('side', .53, .08, .92, .86, 'glass')]


def panes(count, low, high):
    """A row of `count` window marks along a vehicle's side."""
    return [('side', (i + .1) / count, low, (i + .9) / count, high, 'glass') for i in range(count)]


VEHICLES = {
    'car': [(1.8, .64, 4.3, .2, 0, .05, 'paint', CAR_BODY),
            (1.66, .62, 2.7, .84, .5, .25, 'paint', CAR_GLASS)],
    'van': [(1.9, .9, 4.8, .25, 0, .03, 'paint', CAR_BODY),
            (1.85, .85, 4.0, 1.15, .1, .15, 'paint', CAR_GLASS)],
    'pickup': [(2.0, .8, 5.6, .4, 0, .03, 'paint', CAR_BODY + [('end', .2, .5, .8, .9, 'dent')]),
               (1.85, .7, 2.2, 1.2, 2.2, .22, 'paint', CAR_GLASS)],
    'truck': [(2.4, 2.4, 2.0, .5, 6.0, .05, 'paint', [('end', .08, .5, .92, .85, 'glass'),
                                                      ('side', .2, .5, .8, .85, 'glass')] + LAMPS),
              (2.5, 2.9, 5.8, .6, 0, 0, 'load', [('end', .48, 0, .52, 1, 'dent'),
                                                 ('end', 0, 0, 1, .1, 'tyre'),
                                                 ('end', .03, .1, .15, .18, 'lamp'),
                                                 ('end', .85, .1, .97, .18, 'lamp'),
                                                 ('side', .05, .55, .95, .75, 'stripe')])],
    'bus': [(2.5, 2.8, 10.5, .3, 0, .04, 'paint',
             panes(8, .5, .85) + [('side', 0, .12, 1, .26, 'stripe'),
                                  ('end', .08, .46, .92, .82, 'glass'),
                                  ('end', .3, .86, .7, .96, 'plate'),
                                  ('end', .04, .12, .18, .26, 'lamp'),
                                  ('end', .82, .12, .96, .26, 'lamp')])],
    'train': [(2.4, 3.2, 22, .2, 0, .06, 'paint',
               panes(12, .42, .82) + [('side', 0, .9, 1, 1, 'stripe'), ('side', 0, 0, 1, .15, 'tyre'),
                                      ('end', .1, .4, .9, .84, 'glass'),
                                      ('end', 0, .12, 1, .22, 'stripe')])],
    'autorickshaw': [(1.45, .8, 2.7, .25, 0, .05, 'paint', LAMPS + PLATE),
                     (1.42, .9, 2.4, 1.05, .05, .16, 'load', [('end', .12, .1, .88, .68, 'glass'),
                                                             ('side', .1, 0, .5, .75, 'glass'),
                                                             ('side', .6, 0, .95, .75, 'glass')])],
    'vehicle fallback': [(1.7, 1.3, 1.6, .5, 3.2, .2, 'paint', []),
                         (2.1, .5, 3.2, .6, 0, 0, 'dent', LAMPS),
                         (2.2, 1.3, 3.2, 1.1, 0, .35, 'load', [])]}
LABELS = {'van': 'car', 'pickup': 'car'}
WHITE, BLACK, RED, YELLOW = (225, 225, 220), (28, 28, 32), (185, 30, 35), (235, 190, 30)
BLUE, GREEN, GREY, SILVER = (30, 70, 165), (20, 105, 65), (95, 98, 104), (160, 164, 168)
CLOTHES = [(40, 45, 60), (60, 60, 64), (120, 40, 40), (55, 75, 110), (150, 148, 140), (30, 30, 30)]
SARIS = [(225, 60, 110), (240, 150, 30), (60, 150, 90), (235, 225, 200), (90, 60, 160), RED]
DISC, TRIANGLE, DIAMOND, OCTAGON, PANEL = (14, 0), (3, 0), (4, 0), (8, .39), (4, math.pi / 4)

LOOKS = {
    'germany': {
        'focal': (.60, .68), 'eye': (1.25, 1.4), 'hood': 1.0, 'haze': ((196, 201, 204), 170),
        'moods': [dict(zenith=(150, 158, 168), skyline=(214, 217, 219), gain=(.94, 1.0, 1.03),
                       saturation=.72, contrast=.95, exposure=.95, sun=.06, clouds=.10),
                  dict(zenith=(112, 120, 132), skyline=(176, 182, 188), gain=(.90, .98, 1.04),
                       saturation=.6, contrast=.9, exposure=.78, sun=.03, clouds=.16)],
        'road': (92, 94, 99), 'walk': (150, 146, 142), 'leaf': [(62, 92, 44), (74, 98, 52)],
        'facade': [(206, 190, 150), (196, 196, 190), (178, 150, 120), (188, 128, 104),
                   (214, 206, 188), (152, 158, 162)],
        'storeys': (4, 7), 'roof': (128, 62, 50), 'crown': 1.0, 'clothes': CLOTHES,
        'traffic': {'car': .5, 'van': .1, 'bicycle': .2, 'bus': .1, 'truck': .07, 'motorcycle': .08},
        'paint': {'bus': [(210, 205, 190), (180, 40, 45), YELLOW], 'truck': [WHITE, BLUE, RED]},
        'cars': [BLACK, (60, 62, 68), SILVER, (190, 192, 195), (35, 45, 80), (120, 28, 32)],
        'load': [(190, 190, 186), (70, 90, 130)],
        'front': {'building': .84, 'trees': .08, 'wall': .04, 'fence': .06},
        'roadside': {'tree': 1.0, 'pole': 1.6, 'sign': 1.4, 'light': .6, 'person': 2.4,
                     'bike': .8, 'static': .5},
        'signs': [(DISC, WHITE, RED), (TRIANGLE, WHITE, RED), (DISC, BLUE, WHITE),
                  (PANEL, BLUE, WHITE), (DIAMOND, YELLOW, WHITE), (OCTAGON, RED, WHITE)],
        'light': BLACK},
    'usa': {
        'focal': (.52, .6), 'eye': (1.3, 1.5), 'hood': .3, 'haze': ((205, 218, 236), 500),
        'moods': [dict(zenith=(58, 118, 205), skyline=(176, 208, 240), gain=(1.04, 1.01, .98),
                       saturation=1.3, contrast=1.25, exposure=1.1, sun=.3, clouds=.22),
                  dict(zenith=(70, 130, 220), skyline=(200, 220, 240), gain=(1.06, 1.0, .93),
                       saturation=1.2, contrast=1.35, exposure=1.0, sun=-.32, clouds=.05),
                  dict(zenith=(62, 66, 120), skyline=(250, 164, 96), gain=(1.12, .92, .88),
                       saturation=1.2, contrast=1.1, exposure=.62, sun=.2, clouds=.2)],
        'road': (112, 110, 108), 'walk': (184, 178, 168), 'leaf': [(48, 84, 36), (84, 108, 40)],
        'facade': [(168, 92, 70), (214, 196, 164), (150, 160, 172), (226, 220, 210),
                   (130, 100, 84)],
        'storeys': (1, 4), 'roof': None, 'crown': .65, 'clothes': [WHITE, BLUE, RED, BLACK, SILVER],
        'traffic': {'car': .46, 'van': .16, 'pickup': .2, 'truck': .1, 'bus': .07, 'motorcycle': .02,
                    'bicycle': .02},
        'paint': {'bus': [(240, 176, 20), (235, 235, 235), (40, 90, 170)],
                  'truck': [RED, WHITE, (40, 70, 140)]},
        'cars': [WHITE, WHITE, BLACK, RED, BLUE, SILVER, (120, 105, 80), (60, 66, 74)],
        'load': [WHITE, (210, 206, 196), (150, 70, 50)],
        'front': {'building': .46, 'trees': .34, 'wall': .08, 'fence': .12},
        'roadside': {'tree': 1.6, 'pole': 1.6, 'sign': .8, 'light': .2, 'person': .8, 'bike': .1,
                     'static': .2},
        'signs': [(PANEL, GREEN, WHITE), (OCTAGON, RED, WHITE), (DIAMOND, YELLOW, BLACK),
                  (PANEL, WHITE, BLACK)],
        'light': (222, 170, 20)},
    'india': {
        'focal': (.54, .64), 'eye': (1.45, 1.75), 'hood': .25, 'haze': ((226, 208, 172), 60),
        'moods': [dict(zenith=(214, 208, 186), skyline=(240, 226, 192), gain=(1.1, 1.0, .82),
                       saturation=1.05, contrast=.92, exposure=1.05, sun=.12, clouds=.03),
                  dict(zenith=(186, 192, 186), skyline=(234, 214, 176), gain=(1.08, .98, .8),
                       saturation=1.0, contrast=1.0, exposure=.92, sun=-.14, clouds=.06)],
        'road': (118, 108, 98), 'walk': (172, 150, 124), 'leaf': [(58, 74, 30), (86, 88, 40)],
        'facade': [(226, 186, 140), (150, 190, 190), (222, 150, 140), (220, 208, 130),
                   (190, 180, 168), (170, 150, 190)],
        'storeys': (1, 5), 'roof': None, 'crown': 1.5, 'clothes': SARIS,
        'traffic': {'car': .24, 'autorickshaw': .24, 'motorcycle': .28, 'truck': .09, 'bus': .09,
                    'bicycle': .06, 'vehicle fallback': .06},
        'paint': {'bus': [(200, 50, 40), (60, 120, 170), (220, 120, 40)],
                  'truck': [(220, 110, 30), YELLOW, (60, 110, 150)],
                  'autorickshaw': [(60, 130, 60), (50, 120, 70), (225, 185, 40)],
                  'vehicle fallback': [RED, (60, 90, 150)]},
        'cars': [WHITE, WHITE, SILVER, (190, 180, 160), (130, 30, 30), (70, 75, 85)],
        'load': [(222, 180, 40), (230, 185, 50), (190, 150, 90)],
        'front': {'building': .55, 'trees': .2, 'wall': .17, 'fence': .08},
        'roadside': {'tree': 1.0, 'pole': 2.0, 'sign': .4, 'light': .12, 'person': 2.6, 'bike': .1,
                     'parked': .9, 'cow': .5, 'stall': .8, 'billboard': .6, 'rubble': .5},
        'signs': [(PANEL, BLUE, WHITE), (TRIANGLE, WHITE, RED), (DISC, WHITE, RED)],
        'light': BLACK}}


def tone(colour, factor):
    """`colour` times `factor`, as a valid (r, g, b)."""
    return tuple(max(0, min(255, int(c * factor))) for c in colour)


def patch(quad, u0, v0, u1, v1):
    """Part of a quadrilateral in space: u along its lower edge, v upwards, both in [0, 1]."""
    def at(u, v):
        low = [a + (b - a) * u for a, b in zip(quad[0], quad[1])]
        high = [a + (b - a) * u for a, b in zip(quad[3], quad[2])]
        return tuple(a + (b - a) * v for a, b in zip(low, high))
    return [at(u0, v0), at(u1, v0), at(u1, v1), at(u0, v1)]


class Scene:
    """A camera, a canvas and the labelled outlines painted so far.

    Points in space are (x, y, z) in metres: right of the camera, above the ground, ahead.
    """

    def __init__(self, country, rng, height, width):
        self.look, self.height, self.width = LOOKS[country], height, width
        self.rng, self.grain = rng.spawn(2)  # the layout does not depend on the picture's size
        self.mood = self.pick(self.look['moods'])
        self.focal = width * rng.uniform(*self.look['focal'])
        self.eye = rng.uniform(*self.look['eye'])
        self.horizon, self.centre = height * rng.uniform(.38, .46), width * rng.uniform(.42, .58)
        self.bend = rng.uniform(-.0015, .0015)
        self.objects, self.things = [], []
        self.canvas = sky(self).resize((2 * width, 2 * height))
        self.layers = [Image.new('RGB', (width, height)), Image.new('L', (width, height), 255)]
        self.pens = [ImageDraw.Draw(image) for image in (self.canvas, *self.layers)]

    def pick(self, options):
        """One of `options`; of a dict, a key drawn by its weight."""
        if isinstance(options, dict):
            shares = np.cumsum(list(options.values()))
            return list(options)[int(np.searchsorted(shares, self.rng.random() * shares[-1]))]
        return options[int(self.rng.integers(len(options)))]

    def polygon(self, points, colour, label=None, depth=0):
        """Paints pixel `points`; with a label, also records the outline, rounded to pixels."""
        if colour is not None:
            self.pens[0].polygon([(2 * x + .5, 2 * y + .5) for x, y in points], fill=colour)
        outline = [(round(x), round(y)) for x, y in points]
        xs, ys = zip(*outline)
        seen = max(xs) >= 0 and min(xs) < self.width and max(ys) >= 0 and min(ys) < self.height
        if label is None or not seen:
            return
        self.objects.append({'label': label, 'polygon': [list(point) for point in outline]})
        depth = 0 if label in BY_ROW else max(1, min(255, int(depth)))
        self.pens[1].polygon(outline, fill=(*TEXTURE.get(label, (3, 4)), depth))
        self.pens[2].polygon(outline, fill=255)

    def project(self, points):
        """Points in metres to pixels; nothing is nearer than one metre."""
        pixels = []
        for x, y, z in points:
            z = max(z, 1.0)
            pixels.append((self.centre + self.focal * (x + self.bend * z * z) / z,
                           self.horizon + self.focal * (self.eye - y) / z))
        return pixels

    def face(self, points, colour, label=None):
        """Paints a polygon given in metres."""
        depth = sum(z for _, _, z in points) / len(points)
        self.polygon(self.project(points), colour, label, depth)

    def strip(self, a, b, colour, label=None, near=1.0, far=150.0, low=0.0, high=0.0, jag=0.0):
        """A band along the street between the lines x = a, y = low and x = b, y = high."""
        steps = max(1, math.ceil(5 * math.log(far / near)))
        zs = [near * (far / near) ** (i / steps) for i in range(steps + 1)]
        shift = self.rng.uniform(-jag, jag, (2, steps + 1)).tolist()
        self.face([(a + d, low, z) for z, d in zip(zs, shift[0])]
                  + [(b + d, high, z) for z, d in zip(zs[::-1], shift[1])], colour, label)

    def shadow(self, x, z, width, length, dark=90):
        """Darkens the ground; what is painted there later is in the light again."""
        ground = [(x + dx, 0, z + dz) for dx, dz in ring(0, 0, width / 2, length / 2)]
        self.pens[2].polygon(self.project(ground), fill=dark)

    def box(self, label, x, z, size, base, inset, colour):
        """Paints a box with its near lower edge at (x, base, z); returns the upright faces."""
        (width, height, length), sun = size, self.mood['sun']
        left, right, top, back = x - width / 2, x + width / 2, base + height, z + length
        axis = self.bend * z * z
        if top < self.eye:
            self.face([(left + inset, top, z + inset), (right - inset, top, z + inset),
                       (right - inset, top, back - inset), (left + inset, top, back - inset)],
                      tone(colour, 1.15), label)
        faces = {}
        if left > axis or right < axis:
            edge, lean = (left, inset) if left > axis else (right, -inset)
            faces['side'] = [(edge, base, z), (edge, base, back), (edge + lean, top, back - inset),
                             (edge + lean, top, z + inset)]
            self.face(faces['side'], tone(colour, 1 - sun if left > axis else 1 + sun), label)
        faces['end'] = [(left, base, z), (right, base, z), (right - inset, top, z + inset),
                        (left + inset, top, z + inset)]
        self.face(faces['end'], tone(colour, .86), label)
        return faces

    def sprite(self, label, x, z, parts, palette, stretch=1.0, scale=1.0):
        """Paints an upright figure that faces the camera."""
        for colour, outline in parts:
            self.face([(x + dx * stretch * scale, y * scale, z) for dx, y in outline],
                      palette[colour], label)

    def add(self, z, paint, *args):
        """Queues `paint(scene, *args)`; `paint_things` runs the queue from far to near."""
        self.things.append((z, paint, args))

    def paint_things(self):
        for _, paint, args in sorted(self.things, key=lambda thing: -thing[0]):
            paint(self, *args)


def vehicle(scene, x, z, kind, oncoming=False):
    """A vehicle on wheels whose nearest end is at (x, z), seen from the rear or oncoming."""
    look, label = scene.look, LABELS.get(kind, kind)
    boxes = VEHICLES[kind]
    length = max(box[2] + box[4] for box in boxes)
    palette = {'paint': tone(scene.pick(look['paint'].get(kind, look['cars'])),
                             scene.rng.uniform(.85, 1.15)),
               'load': scene.pick(look['load']), 'glass': (48, 56, 66), 'tyre': BLACK,
               'dent': (70, 66, 62), 'lamp': (250, 245, 215) if oncoming else (215, 30, 30),
               'plate': WHITE, 'stripe': scene.pick([WHITE, RED, YELLOW, BLUE])}
    width = boxes[0][0]
    scene.shadow(x, z + length / 2, width * 1.25, length * 1.1)
    for wheel_z in (z + length * .82, z + length * .16):
        for side in (-1, 1):
            edge = x + side * (width / 2 - .12)
            scene.face([(edge, y, wheel_z + dz) for dz, y in ring(0, .34, .36)], BLACK, label)
            scene.face([(edge - .12, 0, wheel_z), (edge + .12, 0, wheel_z), (edge + .12, .6, wheel_z),
                        (edge - .12, .6, wheel_z)], BLACK, label)
    starts = [length - box[4] - box[2] if oncoming else box[4] for box in boxes]
    for box, start in sorted(zip(boxes, starts), key=lambda row: (row[0][3] > .7, -row[1])):
        faces = scene.box(label, x, z + start, box[:3], box[3], box[5], palette[box[6]])
        for face, u0, v0, u1, v1, colour in box[7]:
            if face in faces:
                scene.face(patch(faces[face], u0, v0, u1, v1), palette[colour])


def clothes(scene):
    """Colours of a person's clothes and skin."""
    skin = scene.pick([(196, 150, 122), (150, 104, 78), (112, 76, 56)])
    shirt = scene.pick(scene.look['clothes'])
    return {'trousers': scene.pick([(40, 42, 56), (62, 60, 58), (48, 58, 84), (104, 92, 76)]),
            'shirt': shirt, 'sleeve': tone(shirt, .85), 'skin': skin,
            'hair': scene.pick([(30, 24, 20), (70, 48, 30)])}


def person(scene, x, z):
    scene.shadow(x, z, 1.0, 1.2)
    scene.sprite('person', x, z, scene.pick(WALKERS), clothes(scene),
                 scene.pick((-1, 1)), scene.rng.uniform(.95, 1.15))


def two_wheeler(scene, x, z, kind, riders=1):
    """A bicycle or motorcycle with `riders` people on it."""
    stretch = scene.pick((-1, 1)) * scene.rng.uniform(.55, 1.0)
    paint = scene.pick([RED, BLACK, BLUE, SILVER] if kind == 'motorcycle' else [GREEN, BLACK, RED])
    palette = {'paint': paint, 'tyre': BLACK, 'lamp': WHITE,
               'spokes': GREY if kind == 'motorcycle' else (140, 140, 138)}
    scene.shadow(x, z, 2.0, 1.2)
    scene.sprite(kind, x, z, MOTORCYCLE if kind == 'motorcycle' else BICYCLE, palette, stretch, 1.1)
    for i in reversed(range(riders)):
        palette = clothes(scene)
        if kind == 'motorcycle':
            palette['hair'] = scene.pick([RED, BLACK, WHITE, YELLOW])
        scene.sprite('rider', x - .45 * i * stretch, z, RIDER, palette, stretch, 1.1)


def cow(scene, x, z):
    hide = scene.pick([(226, 216, 200), (130, 88, 58), (64, 54, 50)])
    palette = {'hide': hide, 'spot': tone(hide, .7), 'horn': (230, 220, 190)}
    scene.shadow(x, z, 2.6, 1.4)
    scene.sprite('animal', x, z, COW, palette, scene.pick((-1, 1)) * scene.rng.uniform(.7, 1), 1.1)


def tree(scene, x, z, trunk=True):
    """A crown of blobs, lighter on the side of the sun, on a trunk (part of the class)."""
    rng, leaf = scene.rng, scene.pick(scene.look['leaf'])
    spread = rng.uniform(1.5, 2.4) * scene.look['crown']
    middle = rng.uniform(3.6, 5.0) if trunk else .6
    scene.shadow(x + spread * math.copysign(.6, -scene.mood['sun']), z, 2.6 * spread, 2 * spread, 130)
    if trunk:
        scene.face([(x - .2, 0, z), (x + .2, 0, z), (x + .15, middle, z), (x - .15, middle, z)],
                   (74, 60, 48), 'vegetation')
    for i in range(9):
        size = spread * rng.uniform(.4, .7) * (1 if trunk else .5)
        dx, dy = rng.normal(0, .5, 2) * spread * (1, 1.0 if trunk else .2)
        bright = .85 + .05 * i + .3 * scene.mood['sun'] * np.sign(dx) + .08 * dy / spread
        blob = ring(x + dx, max(middle + dy, size * .7), size, size * rng.uniform(.8, 1.1), 9)
        scene.face([(px, py, z) for px, py in blob], tone(leaf, bright), 'vegetation')


def post(scene, x, z, height, width=.16):
    """The bare pole under a lamp, a sign or a signal."""
    scene.face([(x - width / 2, 0, z), (x + width / 2, 0, z), (x + width / 2, height, z),
                (x - width / 2, height, z)], (112, 114, 116), 'pole')


def lamp_post(scene, x, z):
    height, arm = scene.rng.uniform(5.5, 8), -math.copysign(1.6, x)
    post(scene, x, z, height, .2)
    scene.face([(x, height - .2, z), (x + arm, height, z), (x + arm, height + .16, z),
                (x, height, z)], (112, 114, 116), 'pole')


def sign(scene, x, z):
    (corners, turn), inner, rim = scene.pick(scene.look['signs'])
    size, y = scene.rng.uniform(.42, .62), scene.rng.uniform(2.2, 2.8)
    post(scene, x, z, y, .12)
    for scale, colour, label in ((1, rim, 'traffic sign'), (.76, inner, None)):
        outline = ring(x, y, size * scale, size * scale, corners, turn)
        scene.face([(px, py, z) for px, py in outline], colour, label)
    scene.face([(x - size * .3, y - .06, z), (x + size * .3, y - .06, z), (x + size * .3, y + .06, z),
                (x - size * .3, y + .06, z)], rim)


def lamps(scene, x, y, z):
    """The housing of a traffic light with one of its three lamps lit."""
    scene.face([(x - .26, y, z), (x + .26, y, z), (x + .26, y + 1.3, z), (x - .26, y + 1.3, z)],
               scene.look['light'], 'traffic light')
    lit = scene.pick((0, 1, 2))
    for i, colour in enumerate([(60, 240, 150), (255, 190, 40), (255, 50, 40)]):
        disc = ring(x, y + .25 + .4 * i, .17)
        scene.face([(px, py, z) for px, py in disc], colour if i == lit else (48, 44, 42))


def traffic_light(scene, x, z):
    post(scene, x, z, 3.4)
    lamps(scene, x, 2.3, z)


def signal_mast(scene, x, z):
    """A mast with an arm over the lanes and signals that hang from it."""
    post(scene, x, z, 6.2, .24)
    scene.face([(x, 5.9, z), (-2.0, 5.9, z), (-2.0, 6.1, z), (x, 6.1, z)], (112, 114, 116), 'pole')
    for lamp_x in (-1.6, x * .3, x * .65):
        lamps(scene, lamp_x, 4.9, z)


def gantry(scene, x, z):
    """A large direction sign over the road."""
    post(scene, x, z, 6.4, .3)
    colour = scene.pick([inner for shape, inner, _ in scene.look['signs'] if shape == PANEL])
    left, right = sorted((x, x - math.copysign(scene.rng.uniform(4, 7), x)))
    quad = [(left, 4.9, z), (right, 4.9, z), (right, 6.8, z), (left, 6.8, z)]
    scene.face(quad, WHITE, 'traffic sign')
    scene.face(patch(quad, .03, .06, .97, .94), colour)
    for v in (.25, .6):
        scene.face(patch(quad, .15, v, .8, v + .14), WHITE)


def static(scene, x, z):
    """A bin or a box on the pavement: void."""
    scene.box('static', x, z, (.9, 1.1, .8), 0, .05, scene.pick([(70, 74, 70), (96, 84, 64), BLUE]))


def rubble(scene, x, z):
    heap = ring(x, 0, scene.rng.uniform(.8, 1.6), .7, 9)
    scene.face([(px, max(0, py), z) for px, py in heap], (150, 128, 104), 'unlabeled')


def stall(scene, x, z):
    """A market stall: goods under an awning on two sticks."""
    scene.box('obs-str-bar-fallback', x, z, (2.2, 1.0, 1.6), 0, 0, (150, 112, 80))
    for i in range(5):
        goods = ring(x - .9 + .45 * i, 1.05, .24, .2, 7)
        scene.face([(px, py, z) for px, py in goods], scene.pick(SARIS), 'obs-str-bar-fallback')
    roof = [(x - 1.5, 2.1, z), (x + 1.5, 2.1, z), (x + 1.3, 2.8, z + 1), (x - 1.3, 2.8, z + 1)]
    scene.face(roof, scene.pick([(60, 110, 180), (220, 210, 190), (200, 90, 60)]),
               'obs-str-bar-fallback')
    for stick in (-1.35, 1.3):
        scene.face([(x + stick, 0, z), (x + stick + .08, 0, z), (x + stick + .08, 2.2, z),
                    (x + stick, 2.2, z)], (90, 70, 50), 'obs-str-bar-fallback')


def billboard(scene, x, z):
    """An advertisement on two legs."""
    post(scene, x - 1.2, z, 4.2, .2)
    post(scene, x + 1.2, z, 4.2, .2)
    quad = [(x - 2.4, 3.6, z), (x + 2.4, 3.6, z), (x + 2.4, 6.4, z), (x - 2.4, 6.4, z)]
    poster(scene, quad)


def poster(scene, quad):
    """Fills a quadrilateral with an advertisement."""
    scene.face(quad, scene.pick([YELLOW, (230, 60, 110), (40, 140, 200), WHITE, (240, 120, 30)]),
               'billboard')
    scene.face(patch(quad, .06, .15, .36, .85), scene.pick(SARIS))
    for v in (.22, .55):
        scene.face(patch(quad, .44, v, .92, v + .2), scene.pick([BLACK, RED, BLUE, WHITE]))


ROADSIDE = {'tree': tree, 'pole': lamp_post, 'sign': sign, 'light': traffic_light, 'person': person,
            'static': static, 'cow': cow, 'stall': stall, 'billboard': billboard, 'rubble': rubble,
            'bike': lambda scene, x, z: two_wheeler(scene, x, z, 'bicycle', 0),
            'parked': lambda scene, x, z: two_wheeler(scene, x, z, 'motorcycle', 0)}


def building(scene, side, x, near, far):
    """A house from `near` to `far` along the street, its facade at x; `side` is -1 or 1."""
    rng, look = scene.rng, scene.look
    storeys = int(rng.integers(*look['storeys']))
    wall, height, x = tone(scene.pick(look['facade']), rng.uniform(.85, 1.1)), 3.2 * storeys, side * x
    deep = x + side * 12
    if look['roof']:
        ridge = [(x, height, near), (x, height, far), (x + side * 4, height + 3, far),
                 (x + side * 4, height + 3, near)]
        scene.face(ridge, tone(look['roof'], rng.uniform(.8, 1.2)), 'building')
    front = [(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)]
    end = [(x, 0, near), (deep, 0, near), (deep, height, near), (x, height, near)]
    for quad, light, length in ((end, .84, 12), (front, 1 - side * scene.mood['sun'], far - near)):
        scene.face(quad, tone(wall, light), 'building')
        columns = max(1, int(length / rng.uniform(2.2, 3.4)))
        for row in range(storeys):
            low, high = ((row + .3) / storeys, (row + .8) / storeys) if row else (.02, .8 / storeys)
            for i in range(columns):
                glass = tone((66, 74, 86), rng.uniform(.6, 1.5))
                scene.face(patch(quad, (i + .22) / columns, low, (i + .78) / columns, high), glass)
        scene.face(patch(quad, 0, .98, 1, 1), tone(wall, .7 * light))
    if 'stall' in look['roadside']:
        shop_front(scene, side, x, near, far)


def shop_front(scene, side, x, near, far):
    """Awnings and shop signs before an Indian facade."""
    if scene.rng.random() < .6:
        poster(scene, [(x, 2.7, near + .5), (x, 2.7, far - 1), (x, 3.9, far - 1), (x, 3.9, near + .5)])
    if scene.rng.random() < .6:
        colour = scene.pick([(70, 120, 180), (190, 180, 160), (190, 90, 70), (80, 130, 90)])
        scene.face([(x - side * 1.4, 2.1, near), (x - side * 1.4, 2.1, far), (x, 2.7, far),
                    (x, 2.7, near)], colour, 'obs-str-bar-fallback')


def barrier(scene, side, x, near, far, kind):
    """A wall, a fence or a guard rail along the street."""
    x, light = side * x, 1 - side * scene.mood['sun']
    if kind == 'wall':
        colour = tone(scene.pick([(150, 120, 100), (168, 164, 156), (196, 178, 140)]), light)
        top = scene.rng.uniform(1.8, 2.6)
        scene.strip(x, x, colour, 'wall', near, far, 0, top)
        scene.strip(x, x, tone(colour, .75), None, near, far, top - .2, top)
        return
    low, top = (.45, .9) if kind == 'guard rail' else (0, 1.5)
    scene.strip(x, x, (178, 182, 186) if low else (120, 124, 116), kind, near, far, low, top)
    for v in (.55, .8) if low else (.1, .7, 1.4):
        scene.strip(x, x, (88, 90, 92), None, near, far, v, v + .06)
    for z in np.arange(near, far, 1.2).tolist():
        scene.face([(x, 0, z), (x, 0, z + .16), (x, top, z + .16), (x, top, z)], (76, 78, 76))


def street_front(scene, side, x, kinds):
    """Lines one side of the street with houses, walls, fences and gaps full of trees."""
    z = 1.5
    while z < 110:
        far, kind = z + scene.rng.uniform(7, 16), scene.pick(kinds)
        if kind == 'building':
            scene.add(far, building, side, x + scene.rng.uniform(0, .8), z, far)
        elif kind != 'trees':
            scene.add(far - .1, barrier, side, x, z, far, kind)
        if kind != 'building':
            for _ in range(3):
                scene.add(far + 4, tree, side * (x + scene.rng.uniform(2, 6)),
                          scene.rng.uniform(max(z, 6), far + 4), scene.rng.random() < .75)
        z = far


def roadside(scene, side, edge, width):
    """Scatters people, poles, signs and the like on a pavement of `width` m from x = `edge`."""
    for name, rate in scene.look['roadside'].items():
        for _ in range(scene.rng.poisson(rate)):
            z = 4.5 + 34 * scene.rng.random() ** 1.7
            x = side * (edge + width * scene.rng.uniform(.1, .9))
            scene.add(z, ROADSIDE[name], x, z)


def traffic(scene, x, first, kinds, gap, oncoming=False):
    """Fills the lane around x with vehicles drawn from `kinds`, the first at z = `first`."""
    z = first
    while z < 70:
        kind = scene.pick(kinds)
        at = x + scene.rng.uniform(-.3, .3)
        if kind in ('bicycle', 'motorcycle'):
            crew = 2 if kind == 'motorcycle' and scene.rng.random() < .3 else 1
            scene.add(z, two_wheeler, at, z, kind, crew)
        else:
            scene.add(z, vehicle, at, z, kind, oncoming)
        z += (2 if kind in ('bicycle', 'motorcycle') else 6) + 6 * (kind in ('bus', 'truck', 'train'))
        z += scene.rng.uniform(*gap)


def dashes(scene, x, colour, length=3.0, gap=4.0, width=.16):
    """A lane mark; with gap 0 a solid line."""
    if not gap:
        scene.strip(x - width / 2, x + width / 2, colour, far=70)
        return
    for z in np.arange(scene.rng.uniform(1, 6), 60, length + gap).tolist():
        scene.strip(x - width / 2, x + width / 2, colour, near=z, far=z + length)


def crossing(scene, left, right, z):
    """A zebra crossing and people on it."""
    for x in np.arange(left + .3, right - .5, 1.0).tolist():
        scene.strip(x, x + .5, WHITE, near=z, far=z + 3)
    for _ in range(scene.rng.integers(1, 4)):
        at = z + scene.rng.uniform(.5, 2.5)
        scene.add(at, person, scene.rng.uniform(left, right), at)


def wear(scene, left, right, count):
    """Darker and lighter mends in the road surface."""
    for _ in range(count):
        z, x = scene.rng.uniform(3, 25), scene.rng.uniform(left, right)
        scene.strip(x, x + scene.rng.uniform(.4, 2), tone(scene.look['road'], scene.rng.uniform(.8, 1.15)),
                    near=z, far=z + scene.rng.uniform(1, 6), jag=.2)


def sky_and_ground(scene, ground, colour):
    """Sky above, far skyline at the horizon, `ground` below."""
    w, h, y, rng = scene.width, scene.height, scene.horizon, scene.rng
    scene.polygon([(-1, -1), (w, -1), (w, h), (-1, h)], None, 'sky')
    xs = np.linspace(-1, w, 25)
    tops = y - h * (.03 + .06 * rng.random(25))
    label = scene.pick(('vegetation', 'building'))
    scene.polygon([*zip(xs, tops), (w, y + 2), (-1, y + 2)],
                  scene.pick(scene.look['leaf' if label == 'vegetation' else 'facade']), label, 110)
    scene.polygon([(-1, y), (w, y), (w, h), (-1, h)], colour, ground)


def hood(scene):
    """The bonnet of the camera's own car: void."""
    w, h = scene.width, scene.height
    top, colour = h * scene.rng.uniform(.9, .94), scene.pick([(70, 74, 80), (40, 42, 48), SILVER])
    xs = np.linspace(-.05, 1.05, 13)
    arc = [(w * x, top + h * .35 * (x - .5) ** 2 * (1 + x)) for x in xs]
    scene.polygon([*arc, (w * 1.05, h + 9), (-w * .05, h + 9)], colour, 'ego vehicle', 1)
    scene.polygon([(x, y + h * .012) for x, y in arc] + [(x, y + h * .03) for x, y in arc[::-1]],
                  tone(colour, 1.35))


def germany(scene):
    """A narrow street between tall facades, kerbed pavements, parked cars."""
    rng, look = scene.rng, scene.look
    lane, parking = rng.uniform(2.9, 3.3), (rng.random(2) < .55).tolist()
    left, right = -1.5 * lane - (.3, 2.3)[parking[0]], lane / 2 + (.4, 2.3)[parking[1]]
    walk, wide = rng.uniform(2.2, 4.2), rng.random() < .2
    sky_and_ground(scene, 'terrain' if wide else 'sidewalk', (92, 106, 60) if wide else look['walk'])
    for side, edge in ((-1, left), (1, right)):
        scene.strip(edge, edge + side * walk, look['walk'], 'sidewalk')
        scene.strip(edge, edge + side * .22, tone(look['walk'], 1.25), 'sidewalk')
        setback = walk + (5 if wide else .2)
        street_front(scene, side, abs(edge) + setback, look['front'])
        roadside(scene, side, abs(edge) + .3, walk - .5)
    scene.strip(left, right, look['road'], 'road')
    wear(scene, left, right, 3)
    dashes(scene, -lane / 2, WHITE)
    if rng.random() < .3:
        crossing(scene, left, right, rng.uniform(7, 14))
    for edge, parked, side in ((left, parking[0], -1), (right, parking[1], 1)):
        if parked:
            dashes(scene, edge - side * 2.2, WHITE, gap=0, width=.1)
            traffic(scene, edge - side * 1.1, rng.uniform(3.5, 8), {'car': .8, 'van': .2}, (.3, 4),
                    side < 0)
    traffic(scene, 0, rng.uniform(7, 20), look['traffic'], (4, 22))
    tram = rng.random() < .14
    traffic(scene, -lane, rng.uniform(4, 16), {'train': 1} if tram else look['traffic'], (5, 25), True)
    hood(scene)


def usa(scene):
    """A wide road with yellow centre lines, lawns, low houses; or a highway between walls."""
    rng, look = scene.rng, scene.look
    lane, highway = rng.uniform(3.4, 3.8), rng.random() < .35
    left, right = -(3.5 if highway else 2.5) * lane, lane * (1.5 if rng.random() < .7 else .5) + 1.2
    sky_and_ground(scene, 'terrain', scene.pick([(98, 122, 52), (150, 134, 84), (112, 128, 62)]))
    scene.strip(left, right, look['road'], 'road')
    wear(scene, left, right, 2)
    for side, edge in ((-1, left), (1, right)):
        if highway:
            dashes(scene, edge - side * .6, WHITE, gap=0)
            kinds = {'wall': .5, 'guard rail': .25, 'trees': .25, 'fence': .1}
            street_front(scene, side, abs(edge) + rng.uniform(1.5, 5), kinds)
            continue
        scene.strip(edge, edge + side * .25, tone(look['walk'], 1.1), 'sidewalk')
        scene.strip(edge + side * 1.4, edge + side * 3.0, look['walk'], 'sidewalk')
        street_front(scene, side, abs(edge) + rng.uniform(6, 11), look['front'])
        roadside(scene, side, abs(edge) + .4, 3.5)
    for x in (-.65, -.35):
        dashes(scene, x * lane - .33 * lane + .15, YELLOW, gap=0, width=.14)
    for x in (.5, -1.5, -2.5 if highway else -9):
        dashes(scene, x * lane, WHITE, 3, 5)
    if highway and rng.random() < .6:
        at = rng.uniform(14, 32)
        scene.add(at, gantry, right + .8, at)
    elif not highway and rng.random() < .55:
        at = rng.uniform(11, 24)
        scene.add(at, signal_mast, right + .8, at)
    for x, first, oncoming in ((0, (7, 24), False), (lane, (4, 14), False), (-lane * 1.1, (5, 15), True),
                               (-2 * lane, (5, 20), True)):
        if x < right - 1:
            traffic(scene, x, rng.uniform(*first), look['traffic'], (3, 18), oncoming)
    if rng.random() < look['hood']:
        hood(scene)


def india(scene):
    """Left-hand traffic on dusty asphalt with ragged edges, a painted kerb, stalls, animals."""
    rng, look = scene.rng, scene.look
    lane, median = rng.uniform(3.0, 3.6), rng.random() < .45
    left, right = -lane / 2 - rng.uniform(.2, 2.5), 1.5 * lane + rng.uniform(0, 1.5)
    dust = scene.pick([(182, 150, 108), (168, 132, 96), (190, 166, 126)])
    sky_and_ground(scene, 'non-drivable fallback', dust)
    scene.strip(left, right, look['road'], 'road', jag=.35)
    wear(scene, left, right, 6)
    if rng.random() < .5:
        scene.strip(left - 1.8, left + .4, tone(dust, .9), 'drivable fallback', far=40, jag=.4)
    for side, edge in ((-1, left), (1, right)):
        if rng.random() < .35:
            scene.strip(edge + side * .5, edge + side * 2.6, look['walk'], 'sidewalk')
            striped_curb(scene, edge + side * .4)
        shoulder = rng.uniform(2.5, 5)
        street_front(scene, side, abs(edge) + shoulder, look['front'])
        roadside(scene, side, abs(edge) + .2, shoulder - .5)
    if median:
        scene.add(60, striped_curb, lane * .55)
        if rng.random() < .4:
            scene.add(59, barrier, 1, lane * .55 + .3, 4, 60, 'guard rail')
    elif rng.random() < .5:
        dashes(scene, lane / 2, WHITE, 2, 5)
    for x, first, oncoming in ((0, (6, 15), False), (lane * 1.1, (5, 14), True),
                               (-lane * .45, (8, 25), False)):
        kinds = look['traffic'] if x >= 0 else {'motorcycle': .6, 'bicycle': .2, 'autorickshaw': .2}
        traffic(scene, x, rng.uniform(*first), kinds, (2, 12), oncoming)
    if rng.random() < .25:
        at = rng.uniform(8, 20)
        scene.add(at, cow, rng.uniform(left, right), at)
    if rng.random() < .15:
        scene.add(55, flyover)
    if rng.random() < look['hood']:
        hood(scene)


def striped_curb(scene, x):
    """A raised kerb painted black and yellow (or white) in turn."""
    scene.strip(x, x + .5, (150, 140, 124), 'curb', low=.3, high=.3)
    scene.strip(x, x, YELLOW if scene.rng.random() < .6 else WHITE, 'curb', low=0, high=.3)
    for z in np.arange(1, 40, 2).tolist():
        scene.strip(x, x, BLACK, near=z, far=z + 1, low=0, high=.3)


def flyover(scene):
    """A bridge across the street on two pillars."""
    z = 55
    for x in (-9, 8):
        scene.box('bridge', x, z, (1.8, 6, 2), 0, 0, (168, 160, 146))
    deck = [(-70, 6, z), (70, 6, z), (70, 9, z), (-70, 9, z)]
    scene.face(deck, (176, 168, 152), 'bridge')
    scene.face(patch(deck, 0, .8, 1, .88), (110, 104, 96))


def blotches(rng, height, width, cell):
    """Smooth noise (height, width, 1) with features of about `cell` pixels."""
    coarse = rng.standard_normal((max(2, height // cell), max(2, width // cell)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))[..., None]


def sky(scene):
    """The sky's gradient and clouds, an RGB image."""
    mood, (h, w) = scene.mood, (scene.height, scene.width)
    zenith, skyline = (np.array(mood[key], np.float32) / 255 for key in ('zenith', 'skyline'))
    up = np.clip(np.arange(h) / scene.horizon, 0, 1)[:, None, None].astype(np.float32) ** 1.3
    clouds = blotches(scene.grain, h, w, max(4, h // 9))
    clouds = clouds + blotches(scene.grain, h, w, max(2, h // 20)) * .5
    light = zenith * (1 - up) + skyline * up + mood['clouds'] * np.clip(clouds, 0, 1.5) * (1 - up * .5)
    return Image.fromarray((np.clip(light, 0, 1) * 255).astype(np.uint8))


def develop(scene):
    """The picture, uint8 (H, W, 3): canvas plus texture, shadows, haze and the country's light."""
    mood, rng, (h, w) = scene.mood, scene.grain, (scene.height, scene.width)
    image = np.asarray(scene.canvas.reduce(2), np.float32) / 255
    layers = np.asarray(scene.layers[0], np.float32)
    fine = rng.standard_normal((h, w, 1), dtype=np.float32)
    coarse = blotches(rng, h, w, 3) + blotches(rng, h, w, 8)
    image = image * (1 + (layers[..., :1] * fine + layers[..., 1:2] * .7 * coarse) / 100)
    image *= np.asarray(scene.layers[1], np.float32)[..., None] / 255
    below = np.arange(h)[:, None] - scene.horizon
    by_row = np.where(below > 0, scene.focal * scene.eye / np.maximum(below, .5), 0)
    depth = np.where(layers[..., 2] > 0, layers[..., 2], by_row)[..., None]
    haze, reach = scene.look['haze']
    veil = 1 - np.exp(-depth / reach)
    image = image * (1 - veil) + np.array(haze, np.float32) / 255 * veil
    grey = image.mean(-1, keepdims=True)
    image = grey + (image - grey) * mood['saturation']
    image = (image - .5) * mood['contrast'] + .5
    image = image * mood['exposure'] * np.array(mood['gain'], np.float32)
    image += rng.normal(0, .008, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def draw_scene(country, seed, height=128, width=256):
    """One scene of 'germany', 'usa' or 'india'; `seed` is an int or a sequence of ints.

    Returns the image, uint8 (height, width, 3), and its objects in painter's order, a list of
    {'label': class name, 'polygon': [[x, y], ...] in integer pixels}.
    """
    scene = Scene(country, np.random.default_rng(seed), height, width)
    {'germany': germany, 'usa': usa, 'india': india}[country](scene)
    scene.paint_things()
    return develop(scene), scene.objects

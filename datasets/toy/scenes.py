"""Drawn street scenes of three countries.

A scene is a street modelled in metres, seen through a pinhole camera and painted back to front; its
outlines give both the picture and the labels. The countries differ in light, colours, road
edge and traffic, and in which classes exist at all, so that a network trained on one fails
on the next.
"""
import math

import numpy as np
from PIL import Image, ImageDraw

# Classes whose distance follows from the image row rather than from the outline.
BY_ROW = ('sky', 'road', 'sidewalk', 'terrain', 'non-drivable fallback', 'drivable fallback', 'curb')
# Fine and blotchy texture in percent; (3, 4) for the other classes.
TEXTURE = {'sky': (0, 0), 'road': (4, 5), 'sidewalk': (4, 5), 'terrain': (14, 18), 'vegetation': (18, 26),
           'non-drivable fallback': (8, 14), 'drivable fallback': (8, 12), 'wall': (6, 14), 'fence': (7, 8),
           'static': (12, 20), 'unlabeled': (22, 35), 'obs-str-bar-fallback': (10, 16)}
WHITE, BLACK, RED, YELLOW, BLUE = (225, 225, 220), (28, 28, 32), (185, 30, 35), (235, 190, 30), (30, 70, 165)
GREEN, STEEL, WOOD, SILVER, CONCRETE = (20, 105, 65), (112, 114, 116), (110, 84, 58), (160, 164, 168), (170, 162, 150)


def ring(x, y, width, height=None, corners=12, turn=0.0):
    """Outline of an ellipse with half axes `width`, `height`; few corners give the shapes of signs."""
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + width * math.sin(a), y + (height or width) * math.cos(a)) for a in angles]


def rect(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def sign(outline, inner, rim):
    """A traffic sign on its pole; `outline` holds ring's corners and turn."""
    return [('pole', STEEL, rect(-.06, 0, .06, 2.5)), ('traffic sign', rim, ring(0, 2.6, .52, .52, *outline)),
            ('traffic sign', inner, ring(0, 2.6, .39, .39, *outline)),
            ('traffic sign', rim, rect(-.15, 2.55, .15, 2.65))]


def signal(x, y, housing, lit):
    """The housing of a traffic light and its lamps, of which number `lit` is on."""
    colours = [(60, 240, 150), (255, 190, 40), (255, 50, 40)]
    return [('traffic light', housing, rect(x - .28, y, x + .28, y + 1.35))] + [
        ('traffic light', colours[i] if i == lit else (48, 44, 42), ring(x, y + .27 + .4 * i, .18)) for i in range(3)]


# Upright things: (class, colour or a key of `palette`, outline in metres) in painter's order.
# Positive x is towards the road.
WALKERS = [[('person', 'trousers', [(-.2 - s, 0), (-.06 - s, 0), (.02, .9), (-.2, .9)]),
            ('person', 'trousers', [(.06 + s, 0), (.2 + s, 0), (.2, .9), (-.02, .9)]),
            ('person', 'shirt', [(-.38, .8), (-.26, .8), (-.15, 1.3), (.15, 1.3), (.26, .8), (.38, .8), (.27, 1.47),
                                 (-.27, 1.47)]),
            ('person', 'shirt', rect(-.22, .85, .22, 1.4)),
            ('person', 'skin', ring(0, 1.63, .12, .16)), ('person', 'hair', ring(0, 1.71, .13, .09))]
           for s in (0.0, .12, .25)]
RIDER = [('rider', 'trousers', [(-.3, 1.05), (.0, 1.0), (.34, .72), (.2, .3), (.02, .3), (.12, .68)]),
         ('rider', 'shirt', [(-.34, .95), (.02, .92), (.6, 1.0), (.3, 1.5), (.0, 1.54)]),
         ('rider', 'skin', ring(.22, 1.62, .12, .14)), ('rider', 'helmet', ring(.2, 1.72, .15, .13))]
PILLION = [(label, colour, [(x - .5, y) for x, y in outline]) for label, colour, outline in RIDER]
BICYCLE = [('bicycle', colour, ring(x, .35, radius)) for x in (-.54, .54)
           for colour, radius in ((BLACK, .36), ((140, 140, 138), .27))]
BICYCLE += [('bicycle', 'cycle', [(-.56, .3), (-.26, .88), (.38, .9), (.6, .33), (.48, .3), (.3, .76), (.02, .3)]),
            ('bicycle', BLACK, [(.3, .85), (.42, 1.08), (.62, 1.06), (.4, .85)])]
MOTORCYCLE = [('motorcycle', colour, ring(x, .33, radius)) for x in (-.64, .64)
              for colour, radius in ((BLACK, .34), (STEEL, .16))]
MOTORCYCLE += [('motorcycle', BLACK, [(-.5, .3), (-.4, .62), (.4, .62), (.3, .24), (-.2, .2)]),
               ('motorcycle', 'cycle', [(-.95, .72), (-.2, .58), (.5, .5), (.62, .8), (.45, 1.02), (.1, .98),
                                        (-.1, .85), (-.85, .88)]),
               ('motorcycle', BLACK, rect(-.7, .84, -.06, .96)), ('motorcycle', WHITE, ring(.62, .86, .1))]
COW = [('animal', 'hide', rect(x, 0, x + .16, .9)) for x in (-.88, -.6, .4, .62)]
COW += [('animal', 'hide', [(-.95, .7), (-.9, 1.36), (-.2, 1.3), (.55, 1.42), (.82, 1.2), (.7, .7)]),
        ('animal', 'hide', [(.66, 1.15), (.85, 1.55), (1.1, 1.5), (1.36, 1.14), (1.22, 1.0), (.9, 1.1)]),
        ('animal', WOOD, ring(-.35, 1.1, .26, .16)), ('animal', WHITE, [(.9, 1.5), (.95, 1.75), (1.0, 1.5)])]
POSTER = [('billboard', 'poster', rect(0, 0, 1, 1)), ('billboard', 'shirt', rect(.06, .15, .36, .85)),
          ('billboard', BLACK, rect(.44, .22, .92, .42)), ('billboard', WHITE, rect(.44, .55, .9, .75))]
CLUTTER = 'obs-str-bar-fallback'
STALL = [(CLUTTER, WOOD, rect(-1.1, 0, 1.1, 1)), (CLUTTER, WOOD, rect(-1.35, 0, -1.25, 2)),
         (CLUTTER, WOOD, rect(1.25, 0, 1.35, 2)),
         (CLUTTER, 'awning', [(-1.5, 2), (1.5, 2), (1.3, 2.7), (-1.3, 2.7)])]
STALL += [(CLUTTER, colour, ring(x, 1.05, .26, .22))
          for x, colour in ((-.8, RED), (-.3, YELLOW), (.3, 'shirt'), (.8, GREEN))]
DISC, TRIANGLE, DIAMOND, OCTAGON, PANEL = (14,), (3,), (4,), (8, .39), (4, math.pi / 4)
TRIANGULAR, ROUND, BLUE_PANEL = sign(TRIANGLE, WHITE, RED), sign(DISC, WHITE, RED), sign(PANEL, BLUE, WHITE)
# Each thing has at least one variant.
THINGS = {
    'person': WALKERS, 'bicycle': [BICYCLE + RIDER], 'motorcycle': [MOTORCYCLE + RIDER], 'crew': [
        MOTORCYCLE + PILLION + RIDER], 'parked bicycle': [BICYCLE], 'parked motorcycle': [MOTORCYCLE], 'cow': [COW],
    'lamp post': [[('pole', STEEL, rect(-.1, 0, .1, 7)), ('pole', STEEL, rect(0, 6.8, 1.6, 7))]],
    'german sign': [TRIANGULAR, ROUND, BLUE_PANEL, sign(DIAMOND, YELLOW, WHITE), sign(OCTAGON, RED, WHITE)],
    'us sign': [sign(PANEL, GREEN, WHITE), sign(OCTAGON, RED, WHITE), sign(DIAMOND, YELLOW, BLACK),
                sign(PANEL, WHITE, BLACK)],
    'indian sign': [TRIANGULAR, ROUND, BLUE_PANEL],
    'signal': [[('pole', STEEL, rect(-.08, 0, .08, 3.5))] + signal(0, 2.4, BLACK, lit) for lit in range(3)],
    'signal mast': [[('pole', STEEL, rect(-.12, 0, .12, 6.2)), ('pole', STEEL, rect(0, 5.9, 9, 6.1))]
                    + signal(8, 4.9, (222, 170, 20), lit) + signal(4.5, 4.9, (222, 170, 20), lit) for lit in (0, 2)],
    'gantry': [[('pole', STEEL, rect(-.15, 0, .15, 6.8)), ('traffic sign', WHITE, rect(0, 4.9, 6, 6.9)),
                ('traffic sign', GREEN, rect(.15, 5.05, 5.85, 6.75)), ('traffic sign', WHITE, rect(.6, 5.3, 4.5, 5.6)),
                ('traffic sign', WHITE, rect(.6, 6, 5.2, 6.3))]],
    'bin': [[('static', 'bin', rect(-.45, 0, .45, 1.15)), ('static', BLACK, rect(-.5, 1.05, .5, 1.2))]],
    'rubble': [[('unlabeled', (150, 128, 104), [(-1.2, 0), (-.7, .5), (-.1, .75), (.5, .45), (1.2, 0)])]],
    'stall': [STALL],
    'billboard': [[('pole', STEEL, rect(-1.2, 0, -1, 4)), ('pole', STEEL, rect(1, 0, 1.2, 4))]
                  + [(label, colour, [(4.8 * x - 2.4, 3.4 + 2.8 * y) for x, y in outline])
                     for label, colour, outline in POSTER]],
    'flyover': [[('bridge', CONCRETE, rect(1, 0, 3, 6)), ('bridge', CONCRETE, rect(17, 0, 19, 6)),
                 ('bridge', (182, 174, 158), rect(-60, 6, 80, 9)), ('bridge', STEEL, rect(-60, 8.5, 80, 8.8))]]}

# Vehicles are boxes: width, height, length, height above ground, distance from the rear, inset of the
# top, colour, and marks on the visible faces: (face, u0, v0, u1, v1 as fractions of its sides, colour).
LAMPS = [('end', .03, .5, .2, .8, 'lamp'), ('end', .8, .5, .97, .8, 'lamp')]
BODY = LAMPS + [('end', .36, .25, .64, .48, WHITE), ('end', 0, 0, 1, .16, BLACK), ('side', 0, 0, 1, .12, BLACK)]
GLASS = [('end', .07, .08, .93, .86, 'glass'), ('side', .07, .08, .47, .86, 'glass'),
         ('side', .53, .08, .92, .86, 'glass')]


def panes(count, low, high):
    """Marks of a row of windows along a vehicle's side."""
    return [('side', (i + .1) / count, low, (i + .9) / count, high, 'glass') for i in range(count)]


VEHICLES = {
    'car': [(1.8, .64, 4.3, .2, 0, .05, 'paint', BODY), (1.66, .62, 2.7, .84, .5, .25, 'paint', GLASS)],
    'pickup': [(2.0, .8, 5.6, .4, 0, .03, 'paint', BODY + [('end', .2, .5, .8, .9, STEEL)]),
               (1.85, .7, 2.2, 1.2, 2.2, .22, 'paint', GLASS)],
    'truck': [(2.4, 2.4, 2.0, .5, 6.0, .05, 'paint', [('end', .08, .5, .92, .85, 'glass'), *LAMPS]),
              (2.5, 2.9, 5.8, .6, 0, 0, 'load', [('end', .48, 0, .52, 1, STEEL), ('end', 0, 0, 1, .1, BLACK),
                                                 ('end', .03, .1, .15, .18, 'lamp'),
                                                 ('end', .85, .1, .97, .18, 'lamp'),
                                                 ('side', .05, .55, .95, .75, 'stripe')])],
    'bus': [(2.5, 2.8, 10.5, .3, 0, .04, 'paint', panes(8, .5, .85) + [
        ('side', 0, .12, 1, .26, 'stripe'), ('end', .08, .46, .92, .82, 'glass'), ('end', .3, .86, .7, .96, WHITE),
        ('end', .04, .12, .18, .26, 'lamp'), ('end', .82, .12, .96, .26, 'lamp')])],
    'train': [(2.4, 3.2, 22, .2, 0, .06, 'paint', panes(12, .42, .82) + [
        ('side', 0, .9, 1, 1, WHITE), ('side', 0, 0, 1, .15, BLACK), ('end', .1, .4, .9, .84, 'glass'),
        ('end', 0, .12, 1, .22, WHITE)])],
    'autorickshaw': [(1.45, .8, 2.7, .25, 0, .05, 'paint', BODY),
                     (1.42, .9, 2.4, 1.05, .05, .16, 'load', [('end', .12, .1, .88, .68, 'glass'),
                                                             ('side', .1, 0, .5, .75, 'glass'),
                                                             ('side', .6, 0, .95, .75, 'glass')])],
    'vehicle fallback': [(1.7, 1.3, 1.6, .5, 3.2, .2, 'paint', []), (2.1, .5, 3.2, .6, 0, 0, WOOD, LAMPS),
                         (2.2, 1.3, 3.2, 1.1, 0, .35, 'load', [])]}

# Each country's light (one mood per scene), materials, and how often its things occur.
LOOKS = {
    'germany': {
        'focal': (.60, .68), 'eye': (1.25, 1.4), 'hood': 1.0, 'haze': (196, 201, 204), 'reach': 170,
        'moods': [dict(zenith=(166, 174, 184), skyline=(222, 224, 226), gain=(.94, 1.0, 1.03), saturation=.75,
                       contrast=.95, exposure=1.0, sun=.06, clouds=.10),
                  dict(zenith=(122, 132, 144), skyline=(180, 186, 192), gain=(.90, .98, 1.04), saturation=.65,
                       contrast=.9, exposure=.85, sun=.03, clouds=.14)],
        'road': (92, 94, 99), 'walk': (150, 146, 142), 'leaf': [(62, 92, 44), (74, 98, 52)], 'crown': 1.0,
        'facade': [(206, 190, 150), (196, 196, 190), (178, 150, 120), (188, 128, 104), (214, 206, 188),
                   (152, 158, 162)],
        'storeys': (4, 7), 'roof': (128, 62, 50), 'load': [(190, 190, 186), (70, 90, 130)],
        'clothes': [(40, 45, 60), (60, 60, 64), (120, 40, 40), (55, 75, 110), (150, 148, 140), BLACK],
        'paint': {'bus': [WHITE, RED, YELLOW], 'truck': [WHITE, BLUE, RED], 'train': [RED, YELLOW],
                  'car': [BLACK, (60, 62, 68), SILVER, (190, 192, 195), (35, 45, 80), (120, 28, 32)]},
        'traffic': {'car': .55, 'bicycle': .22, 'bus': .09, 'truck': .09, 'motorcycle': .15},
        'front': {'building': .74, 'trees': .08, 'wall': .08, 'fence': .12},
        'roadside': {'tree': 1.0, 'lamp post': 1.6, 'german sign': 1.4, 'signal': .6, 'person': 2.4,
                     'parked bicycle': .8, 'bin': .5}},
    'usa': {
        'focal': (.52, .6), 'eye': (1.3, 1.5), 'hood': .3, 'haze': (205, 218, 236), 'reach': 500,
        'moods': [dict(zenith=(58, 118, 205), skyline=(176, 208, 240), gain=(1.1, 1.02, .92), saturation=1.3,
                       contrast=1.25, exposure=1.12, sun=.3, clouds=.2),
                  dict(zenith=(70, 130, 220), skyline=(200, 220, 240), gain=(1.1, 1.0, .88), saturation=1.2,
                       contrast=1.3, exposure=1.08, sun=-.32, clouds=.05),
                  dict(zenith=(62, 66, 120), skyline=(250, 164, 96), gain=(1.12, .92, .88), saturation=1.2,
                       contrast=1.1, exposure=.66, sun=.2, clouds=.06)],
        'road': (128, 124, 118), 'walk': (184, 178, 168), 'leaf': [(48, 84, 36), (84, 108, 40)], 'crown': .65,
        'facade': [(168, 92, 70), (214, 196, 164), (150, 160, 172), (226, 220, 210), (130, 100, 84)],
        'storeys': (1, 4), 'roof': None, 'load': [WHITE, (210, 206, 196), (150, 70, 50)],
        'clothes': [WHITE, BLUE, RED, BLACK, SILVER],
        'paint': {'bus': [(240, 176, 20), (240, 176, 20), (40, 90, 170)], 'truck': [RED, WHITE, (40, 70, 140)],
                  'car': [WHITE, WHITE, BLACK, RED, BLUE, SILVER, (120, 105, 80), (60, 66, 74)]},
        'traffic': {'car': .56, 'pickup': .24, 'truck': .11, 'bus': .08, 'motorcycle': .08, 'bicycle': .07},
        'front': {'building': .46, 'trees': .32, 'wall': .08, 'fence': .14},
        'roadside': {'tree': 1.6, 'lamp post': 1.6, 'us sign': 1.0, 'signal': .4, 'person': 2.2, 'bin': .2,
                     'parked bicycle': .15}},
    'india': {
        'focal': (.54, .64), 'eye': (1.45, 1.75), 'hood': .25, 'haze': (226, 208, 172), 'reach': 60,
        'moods': [dict(zenith=(214, 208, 186), skyline=(240, 226, 192), gain=(1.1, 1.0, .82), saturation=1.05,
                       contrast=.92, exposure=1.05, sun=.12, clouds=.03),
                  dict(zenith=(186, 192, 186), skyline=(234, 214, 176), gain=(1.08, .98, .8), saturation=1.0,
                       contrast=1.0, exposure=.92, sun=-.14, clouds=.06)],
        'road': (118, 108, 98), 'walk': (172, 150, 124), 'leaf': [(58, 74, 30), (86, 88, 40)], 'crown': 1.4,
        'facade': [(226, 186, 140), (150, 190, 190), (222, 150, 140), (220, 208, 130), (190, 180, 168),
                   (170, 150, 190)],
        'storeys': (1, 5), 'roof': None, 'load': [(222, 180, 40), (230, 185, 50), (190, 150, 90)],
        'clothes': [(225, 60, 110), (240, 150, 30), (60, 150, 90), (235, 225, 200), (90, 60, 160), RED],
        'paint': {'bus': [(200, 50, 40), (60, 120, 170), (220, 120, 40)], 'truck': [(220, 110, 30), YELLOW, BLUE],
                  'autorickshaw': [(60, 130, 60), (50, 120, 70), YELLOW], 'vehicle fallback': [RED, BLUE],
                  'car': [WHITE, WHITE, SILVER, (190, 180, 160), (130, 30, 30), (70, 75, 85)]},
        'traffic': {'car': .24, 'autorickshaw': .24, 'motorcycle': .2, 'crew': .1, 'truck': .09, 'bus': .09,
                    'bicycle': .1, 'vehicle fallback': .07},
        'front': {'building': .53, 'trees': .17, 'wall': .18, 'fence': .12},
        'roadside': {'tree': .8, 'lamp post': 1.8, 'indian sign': 1.0, 'signal': .4, 'person': 2.6, 'cow': .5,
                     'parked motorcycle': .8, 'parked bicycle': .3, 'stall': .7, 'billboard': .5, 'rubble': .5}}}


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
        self.rng, self.grain = rng.spawn(2)     # so that the layout does not depend on the picture's size
        self.mood = self.pick(self.look['moods'])
        self.focal = width * self.rng.uniform(*self.look['focal'])
        self.eye, self.bend = self.rng.uniform(*self.look['eye']), self.rng.uniform(-.0015, .0015)
        self.horizon, self.centre = height * self.rng.uniform(.38, .46), width * self.rng.uniform(.42, .58)
        self.objects, self.queue = [], []
        self.canvas = sky(self).resize((2 * width, 2 * height))
        self.surface = Image.new('RGB', (width, height))            # fine texture, blotches, distance in metres
        self.light = Image.new('L', (width, height), 255)           # 255 outside shadows
        self.pens = [ImageDraw.Draw(image) for image in (self.canvas, self.surface, self.light)]

    def pick(self, options):
        """One of `options`; for a dict, a key drawn by its weight."""
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
        """Projects points in metres to pixels; points nearer than one metre are moved to one metre."""
        pixels = []
        for x, y, z in points:
            z = max(z, 1.0)
            pixels.append((self.centre + self.focal * (x / z + self.bend * z),
                           self.horizon + self.focal * (self.eye - y) / z))
        return pixels

    def face(self, points, colour, label=None):
        """Paints a polygon given in metres."""
        self.polygon(self.project(points), colour, label, sum(z for _, _, z in points) / len(points))

    def strip(self, a, b, colour, label=None, near=1.0, far=150.0, low=0.0, high=0.0, jag=0.0):
        """A band along the street between the lines x = a, y = low and x = b, y = high."""
        steps = max(1, math.ceil(5 * math.log(far / near)))
        zs = [near * (far / near) ** (i / steps) for i in range(steps + 1)]
        shift = self.rng.uniform(-jag, jag, (2, steps + 1)).tolist()
        self.face([(a + d, low, z) for z, d in zip(zs, shift[0])]
                  + [(b + d, high, z) for z, d in zip(zs[::-1], shift[1])], colour, label)

    def shadow(self, x, z, width, length, dark=90):
        """Darkens the ground; whatever is painted there later is lit again."""
        spot = [(x + dx, 0, z + dz) for dx, dz in ring(0, 0, width / 2, length / 2)]
        self.pens[2].polygon(self.project(spot), fill=dark)

    def box(self, label, x, z, size, base, inset, colour):
        """Paints a box whose near lower edge is centred on (x, base, z); returns its upright faces."""
        (width, height, length), sun = size, self.mood['sun']
        left, right, top, back = x - width / 2, x + width / 2, base + height, z + length
        roof = [(left + inset, top, z + inset), (right - inset, top, z + inset),
                (right - inset, top, back - inset), (left + inset, top, back - inset)]
        end = [(left, base, z), (right, base, z), roof[1], roof[0]]
        quads, axis = {'end': (end, .86)}, self.bend * z * z
        if left > axis:
            quads['side'] = [(left, base, z), (left, base, back), roof[3], roof[0]], 1 - sun
        elif right < axis:
            quads['side'] = [(right, base, z), (right, base, back), roof[2], roof[1]], 1 + sun
        if top < self.eye:
            self.face(roof, tone(colour, 1.15), label)
        for quad, light in quads.values():
            self.face(quad, tone(colour, light), label)
        return {name: quad for name, (quad, _) in quads.items()}

    def add(self, z, paint, *args):
        """Queues `paint(scene, *args)`; `paint_queue` paints from far to near."""
        self.queue.append((z, paint, args))

    def paint_queue(self):
        for _, paint, args in sorted(self.queue, key=lambda entry: -entry[0]):
            paint(self, *args)


def palette(scene, kind, oncoming=False):
    """The colours that vary between things of one kind."""
    look, pick = scene.look, scene.pick
    paint = look['paint'].get(kind, look['paint']['car'])
    return {'paint': tone(pick(paint), scene.rng.uniform(.85, 1.15)), 'load': pick(look['load']),
            'stripe': pick([WHITE, RED, YELLOW, BLUE]), 'glass': (48, 56, 66),
            'lamp': (250, 245, 215) if oncoming else (215, 30, 30), 'shirt': pick(look['clothes']),
            'trousers': pick([(40, 42, 56), (62, 60, 58), (48, 58, 84), (104, 92, 76)]),
            'skin': pick([(196, 150, 122), (150, 104, 78), (112, 76, 56)]), 'hair': pick([(30, 24, 20), (70, 48, 30)]),
            'helmet': pick([RED, BLACK, WHITE, YELLOW]), 'cycle': pick([RED, BLACK, BLUE, GREEN]),
            'hide': pick([(226, 216, 200), (130, 88, 58), (64, 54, 50)]), 'bin': pick([(70, 74, 70), WOOD, BLUE]),
            'awning': pick([(60, 110, 180), (220, 210, 190), (200, 90, 60)]),
            'poster': pick([YELLOW, (230, 60, 110), (40, 140, 200), WHITE, (240, 120, 30)])}


def thing(scene, x, z, name):
    """One of THINGS, upright and facing the camera; people, animals and two-wheelers may be mirrored."""
    parts, colours = scene.pick(THINGS[name]), palette(scene, name)
    stretch, scale = -math.copysign(1, x), scene.rng.uniform(.95, 1.15)
    if parts[0][0] in ('person', 'animal', 'bicycle', 'motorcycle'):
        stretch = scene.pick((-1, 1)) * scene.rng.uniform(.65, 1.05)
    scene.shadow(x, z, 1.5, 1.2)
    for label, colour, outline in parts:
        scene.face([(x + dx * stretch * scale, y * scale, z) for dx, y in outline], colours.get(colour, colour), label)


def vehicle(scene, x, z, kind, oncoming=False):
    """One of VEHICLES on wheels with its nearest end at (x, z)."""
    boxes, colours = VEHICLES[kind], palette(scene, kind, oncoming)
    label = 'car' if kind == 'pickup' else kind
    width, length = boxes[0][0], max(box[2] + box[4] for box in boxes)
    scene.shadow(x, z + length / 2, width * 1.25, length * 1.1)
    for wheel_z in (z + length * .82, z + length * .16):
        for edge in (x - width / 2 + .12, x + width / 2 - .12):
            scene.face([(edge, y, wheel_z + dz) for dz, y in ring(0, .34, .36)], BLACK, label)
            scene.face([(edge + dx, y, wheel_z) for dx, y in rect(-.12, 0, .12, .6)], BLACK, label)
    starts = [length - box[4] - box[2] if oncoming else box[4] for box in boxes]
    for box, start in sorted(zip(boxes, starts), key=lambda row: (row[0][3] > .7, -row[1])):
        faces = scene.box(label, x, z + start, box[:3], box[3], box[5], colours.get(box[6], box[6]))
        for face, u0, v0, u1, v1, colour in box[7]:
            if face in faces:
                scene.face(patch(faces[face], u0, v0, u1, v1), colours.get(colour, colour))


def tree(scene, x, z, trunk=True):
    """A crown of blobs, lighter on the sunny side, on a trunk (part of the class)."""
    rng, leaf = scene.rng, scene.pick(scene.look['leaf'])
    spread = rng.uniform(1.5, 2.4) * scene.look['crown']
    middle = rng.uniform(3.6, 5.0) if trunk else .6
    scene.shadow(x + spread * math.copysign(.6, -scene.mood['sun']), z, 2.6 * spread, 2 * spread, 130)
    if trunk:
        scene.face([(x + dx, y, z) for dx, y in rect(-.2, 0, .2, middle)], (74, 60, 48), 'vegetation')
    for i in range(9):
        size = spread * rng.uniform(.4, .7) * (1 if trunk else .5)
        dx, dy = (rng.normal(0, .5, 2) * spread * (1, 1 if trunk else .2)).tolist()
        bright = .85 + .05 * i + math.copysign(.3, dx) * scene.mood['sun'] + .08 * dy / spread
        blob = ring(x + dx, max(middle + dy, size * .7), size, size * rng.uniform(.8, 1.1), 9)
        scene.face([(px, py, z) for px, py in blob], tone(leaf, bright), 'vegetation')


def building(scene, side, x, near, far):
    """A house from `near` to `far` along the street, its facade at x; `side` is -1 or 1."""
    rng, look = scene.rng, scene.look
    storeys, wall = int(rng.integers(*look['storeys'])), tone(scene.pick(look['facade']), rng.uniform(.85, 1.1))
    height, x = 3.2 * storeys, side * x
    if look['roof']:
        tiles = tone(look['roof'], rng.uniform(.8, 1.2))
        scene.strip(x, x + side * 4, tiles, 'building', near, far, height, height + 3)
    front = [(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)]
    end = [(x, 0, near), (x + side * 12, 0, near), (x + side * 12, height, near), (x, height, near)]
    for quad, light, length in ((end, .84, 12), (front, 1 - side * scene.mood['sun'], far - near)):
        scene.face(quad, tone(wall, light), 'building')
        columns = max(1, int(length / rng.uniform(2.2, 3.4)))
        for row in range(storeys):
            low, high = ((row + .3) / storeys, (row + .8) / storeys) if row else (.02, .8 / storeys)
            for i in range(columns):
                pane = patch(quad, (i + .22) / columns, low, (i + .78) / columns, high)
                scene.face(pane, tone((66, 74, 86), rng.uniform(.6, 1.5)))
        scene.face(patch(quad, 0, .98, 1, 1), tone(wall, .7 * light))


def shop_front(scene, side, x, near, far):
    """A house with a shop sign and an awning."""
    building(scene, side, x, near, far)
    colours, x = palette(scene, 'shop'), side * x
    if scene.rng.random() < .6:
        board = [(x, 2.7, near + .5), (x, 2.7, far - 1), (x, 3.9, far - 1), (x, 3.9, near + .5)]
        for label, colour, outline in POSTER:
            scene.face(patch(board, *outline[0], *outline[2]), colours.get(colour, colour), label)
    if scene.rng.random() < .6:
        scene.strip(x - side * 1.4, x, colours['awning'], CLUTTER, near, far, 2.1, 2.7)


def barrier(scene, x, near, far, kind):
    """A wall, a fence or a guard rail along the street."""
    colour = scene.pick([(150, 120, 100), (168, 164, 156), (196, 178, 140)])
    low, top, rails = {'wall': (0, 2.3, (2.1,)), 'fence': (0, 1.5, (.1, .7, 1.4)),
                       'guard rail': (.45, .9, (.55, .8))}[kind]
    colour = tone(colour if kind == 'wall' else (134, 138, 132), 1 - math.copysign(scene.mood['sun'], x))
    scene.strip(x, x, colour, kind, near, far, low, top)
    for rail in rails:
        scene.strip(x, x, tone(colour, .7), None, near, far, rail, rail + .07)
    if kind != 'wall':
        for z in np.arange(near, far, 1.2).tolist():
            scene.face([(x, 0, z), (x, 0, z + .16), (x, top, z + .16), (x, top, z)], tone(colour, .6))


def street_front(scene, side, x, kinds, house=building):
    """Lines one side of the street with houses, walls, fences and gaps full of trees."""
    z, rng = 1.5, scene.rng
    while z < 110:
        far, kind = z + rng.uniform(7, 16), scene.pick(kinds)
        if kind == 'building':
            scene.add(far, house, side, x + rng.uniform(0, .8), z, far)
        else:
            for _ in range(3):
                scene.add(far + 4, tree, side * (x + rng.uniform(2, 6)), rng.uniform(max(z, 6), far + 4),
                          rng.random() < .75)
            if kind != 'trees':
                scene.add(far, barrier, side * x, z, far, kind)
        z = far


def roadside(scene, side, edge, width):
    """Scatters people, poles, signs and the like on a pavement of `width` m from x = `edge`."""
    for name, rate in scene.look['roadside'].items():
        for _ in range(scene.rng.poisson(rate)):
            z, x = 4.5 + 34 * scene.rng.random() ** 1.7, side * (edge + width * scene.rng.uniform(.1, .9))
            scene.add(z, *((tree, x, z) if name == 'tree' else (thing, x, z, name)))


def traffic(scene, x, first, kinds, gap, oncoming=False):
    """Fills the lane around x with vehicles drawn from `kinds`, the first at z = `first`."""
    z = first
    while z < 70:
        kind, at = scene.pick(kinds), x + scene.rng.uniform(-.3, .3)
        if kind in VEHICLES:
            scene.add(z, vehicle, at, z, kind, oncoming)
            z += max(box[2] + box[4] for box in VEHICLES[kind])
        else:
            scene.add(z, thing, at, z, kind)
        z += 2 + scene.rng.uniform(*gap)


def lane_mark(scene, x, colour, length=3.0, gap=4.0):
    """A broken line along x, solid if gap is 0."""
    starts = np.arange(scene.rng.uniform(1, 6), 60, length + gap).tolist() if gap else [1]
    for z in starts:
        scene.strip(x - .08, x + .08, colour, near=z, far=z + length if gap else 70)


def curb(scene, x):
    """A raised kerb painted in two alternating colours."""
    scene.strip(x, x + .5, (150, 140, 124), 'curb', low=.3, high=.3)
    scene.strip(x, x, scene.pick([YELLOW, WHITE]), 'curb', high=.3)
    for z in range(1, 40, 2):
        scene.strip(x, x, BLACK, near=z, far=z + 1, high=.3)


def backdrop(scene, ground, colour):
    """Sky above, a distant skyline at the horizon, `ground` below; sometimes the camera car's bonnet in front."""
    w, h, y, rng = scene.width, scene.height, scene.horizon, scene.rng
    scene.polygon(rect(-1, -1, w, h), None, 'sky')
    far = scene.pick({'vegetation': .5, 'building': .5})
    tops = y - h * (.03 + .06 * rng.random(25))
    scene.polygon([*zip(np.linspace(-1, w, 25).tolist(), tops.tolist()), (w, y + 2), (-1, y + 2)],
                  scene.pick(scene.look['leaf' if far == 'vegetation' else 'facade']), far, 110)
    scene.polygon(rect(-1, y, w, h), colour, ground)
    if rng.random() < scene.look['hood']:
        scene.add(0, hood)


def hood(scene):
    """The bonnet of the camera's own car."""
    w, h, colour = scene.width, scene.height, scene.pick([(70, 74, 80), (40, 42, 48), SILVER])
    top = h * scene.rng.uniform(.9, .94)
    arc = [(w * (i - 1) / 12, top + h * .35 * ((i - 1) / 12 - .5) ** 2) for i in range(15)]
    scene.polygon([*arc, (w * 1.1, h + 9), (-w * .1, h + 9)], colour, 'ego vehicle', 1)
    scene.polygon([(x, y + h * .01) for x, y in arc] + [(x, y + h * .03) for x, y in arc[::-1]], tone(colour, 1.35))


def germany(scene):
    """A narrow street between tall facades, with pavements, parked cars and trams."""
    rng, look, uniform = scene.rng, scene.look, scene.rng.uniform
    lane, walk, green = uniform(2.9, 3.3), uniform(2.2, 4.2), rng.random() < .35
    parked = {-1: rng.random() < .55, 1: rng.random() < .55}
    edges = {-1: -1.5 * lane - (2.3 if parked[-1] else .3), 1: lane / 2 + (2.3 if parked[1] else .4)}
    backdrop(scene, *(('terrain', (92, 106, 60)) if green else ('sidewalk', look['walk'])))
    for side, edge in edges.items():
        scene.strip(edge, edge + side * walk, look['walk'], 'sidewalk')
        scene.strip(edge, edge + side * .22, tone(look['walk'], 1.25), 'sidewalk')
        if green:
            scene.strip(edge + side * .3, edge + side * 1.5, (92, 106, 60), 'terrain')
        street_front(scene, side, abs(edge) + walk + (5 if green else .2), look['front'])
        roadside(scene, side, abs(edge) + .3, walk - .5)
    scene.strip(edges[-1], edges[1], look['road'], 'road')
    lane_mark(scene, -lane / 2, WHITE)
    for side, edge in edges.items():
        if parked[side]:
            lane_mark(scene, edge - side * 2.2, WHITE, gap=0)
            traffic(scene, edge - side * 1.1, uniform(3.5, 8), {'car': 1}, (0, 3), side < 0)
    traffic(scene, 0, uniform(7, 20), look['traffic'], (4, 22))
    traffic(scene, -lane, uniform(4, 16), {'train': 1} if rng.random() < .15 else look['traffic'], (5, 25), True)


def usa(scene):
    """A wide road with yellow centre lines, lawns and low houses, or a highway."""
    rng, look, uniform = scene.rng, scene.look, scene.rng.uniform
    lane, highway = uniform(3.4, 3.8), rng.random() < .35
    left, right = -(3.5 if highway else 2.5) * lane, lane * (1.5 if rng.random() < .7 else .5) + 1.2
    backdrop(scene, 'terrain', scene.pick([(98, 122, 52), (150, 134, 84), (112, 128, 62)]))
    scene.strip(left, right, look['road'], 'road')
    for side, edge in ((-1, left), (1, right)):
        if highway:
            lane_mark(scene, edge - side * .6, WHITE, gap=0)
            kinds = {'wall': .5, 'guard rail': .2, 'trees': .3, 'fence': .15}
            street_front(scene, side, abs(edge) + uniform(1.5, 5), kinds)
            continue
        scene.strip(edge + side * .9, edge + side * 3.4, look['walk'], 'sidewalk')
        street_front(scene, side, abs(edge) + uniform(5, 10), look['front'])
        roadside(scene, side, abs(edge) + .4, 3.5)
    for x, colour, gap in ((-.94, YELLOW, 0), (-.62, YELLOW, 0), (.5, WHITE, 5), (-1.5, WHITE, 5)):
        lane_mark(scene, x * lane, colour, 3, gap)
    at = uniform(11, 26)
    if rng.random() < .6:
        scene.add(at, thing, right + .8, at, 'gantry' if highway else 'signal mast')
    for x, first, oncoming in ((0, (7, 24), False), (lane, (4, 14), False), (-1.1 * lane, (5, 15), True),
                               (-2 * lane, (5, 20), True)):
        if x < right - 1:
            traffic(scene, x, uniform(*first), look['traffic'], (3, 18), oncoming)


def india(scene):
    """Left-hand traffic on asphalt with ragged dusty edges, painted kerbs, stalls and cattle."""
    rng, look, uniform = scene.rng, scene.look, scene.rng.uniform
    lane, dust = uniform(3.0, 3.6), scene.pick([(182, 150, 108), (168, 132, 96), (190, 166, 126)])
    left, right = -lane / 2 - uniform(.2, 2.5), 1.5 * lane + uniform(0, 1.5)
    backdrop(scene, 'non-drivable fallback', dust)
    scene.strip(left, right, look['road'], 'road', jag=.35)
    if rng.random() < .5:
        scene.strip(left - 1.8, left + .4, tone(dust, .85), 'drivable fallback', far=40, jag=.4)
    for side, edge in ((-1, left), (1, right)):
        shoulder = uniform(2.5, 5)
        if rng.random() < .35:
            scene.strip(edge + side * .5, edge + side * 2.6, look['walk'], 'sidewalk')
            curb(scene, edge + side * .4)
        street_front(scene, side, abs(edge) + shoulder, look['front'], shop_front)
        roadside(scene, side, abs(edge) + .2, shoulder - .5)
    if rng.random() < .45:
        scene.add(99, curb, lane * .55)
        for z in range(4, 60, 8) if rng.random() < .6 else ():
            scene.add(z + 8, barrier, lane * .55 + .3, z, z + 8, 'guard rail')
    else:
        lane_mark(scene, lane / 2, WHITE, 2, 5)
    light = {'motorcycle': .5, 'bicycle': .3, 'autorickshaw': .2}
    for x, first, kinds in ((0, (6, 15), look['traffic']), (lane * 1.1, (5, 14), look['traffic']),
                            (-lane * .45, (8, 25), light)):
        traffic(scene, x, uniform(*first), kinds, (2, 12), x > 0)
    for name, chance, x, near, far in (('cow', .25, uniform(left, right), 8, 20), ('flyover', .2, -9, 30, 55)):
        z = uniform(near, far)
        if rng.random() < chance:
            scene.add(z, thing, x, z, name)


def blotches(rng, height, width, cell):
    """Smooth noise (height, width, 1) with features of about `cell` pixels."""
    coarse = rng.standard_normal((max(2, height // cell), max(2, width // cell)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))[..., None]


def sky(scene):
    """The sky's gradient and clouds, an RGB image."""
    mood, h, w = scene.mood, scene.height, scene.width
    zenith, skyline = (np.array(mood[key], np.float32) / 255 for key in ('zenith', 'skyline'))
    up = np.clip(np.arange(h) / scene.horizon, 0, 1)[:, None, None].astype(np.float32) ** 1.3
    clouds = blotches(scene.grain, h, w, max(4, h // 9)) + blotches(scene.grain, h, w, max(2, h // 20)) * .5
    light = zenith * (1 - up) + skyline * up + mood['clouds'] * np.clip(clouds - .2, 0, 1.2) * (1 - up * .5)
    return Image.fromarray((np.clip(light, 0, 1) * 255).astype(np.uint8))


def develop(scene):
    """The picture, uint8 (H, W, 3): the canvas plus texture, shadows, haze and the country's light."""
    mood, rng, h, w = scene.mood, scene.grain, scene.height, scene.width
    image = np.asarray(scene.canvas.reduce(2), np.float32) / 255
    surface = np.asarray(scene.surface, np.float32)
    coarse = blotches(rng, h, w, 3) + blotches(rng, h, w, 8)
    fine = rng.standard_normal((h, w, 1), dtype=np.float32)
    image = image * (1 + (surface[..., :1] * fine + surface[..., 1:2] * .7 * coarse) / 100)
    image *= np.asarray(scene.light, np.float32)[..., None] / 255
    below = np.arange(h)[:, None] - scene.horizon
    by_row = np.where(below > 0, scene.focal * scene.eye / np.maximum(below, .5), 0)
    depth = np.where(surface[..., 2] > 0, surface[..., 2], by_row)[..., None]
    veil = 1 - np.exp(-depth / scene.look['reach'])
    image = image * (1 - veil) + np.array(scene.look['haze']) / 255 * veil
    grey = image.mean(-1, keepdims=True)
    image = ((grey + (image - grey) * mood['saturation']) - .5) * mood['contrast'] + .5
    image = image * mood['exposure'] * np.array(mood['gain']) + rng.normal(0, .008, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def draw_scene(country, seed, height=128, width=256):
    """One scene of 'germany', 'usa' or 'india'; `seed` is an int or a sequence of ints.

    Returns the image, uint8 (height, width, 3), and its objects in painter's order, a list of
    {'label': class name, 'polygon': [[x, y], ...] in whole pixels}.
    """
    streets = {'germany': germany, 'usa': usa, 'india': india}
    if country not in streets:
        raise ValueError(f'no country {country!r}; choose one of {", ".join(streets)}')
    scene = Scene(country, np.random.default_rng(seed), height, width)
    streets[country](scene)
    scene.paint_queue()
    return develop(scene), scene.objects

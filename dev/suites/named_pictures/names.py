"""Names of the suite named-pictures: accepted answers, plurals, and names that may be confused.

The tables are written by hand. An accepted answer means what the CLDR name means, or is the plain
name of the same drawing ("dog face" -> "dog", "red apple" -> "apple"); a name of a wider class is
none ("bird" for a dove). Names that may be confused are never options of one question, nor in one
picture: their drawings are alike, or an answer fits both.
"""

from __future__ import annotations

from functools import cache

__all__ = ["accepted_answers", "are_confusable", "plural_of", "scene_names"]

# "name: other accepted answers", separated by semicolons; names that are absent have none.
_SYNONYMS = """
monkey face: monkey; dog face: dog; guide dog: seeing eye dog; service dog: assistance dog
orangutan: orang-utan; raccoon: racoon; cat face: cat; black cat: cat; tiger face: tiger
horse face: horse; moose: elk; donkey: burro; cow face: cow; pig face: pig; boar: wild boar
pig nose: pig snout, snout; ram: male sheep; ewe: sheep, female sheep
camel: dromedary, one-hump camel; two-hump camel: camel, bactrian camel; rhinoceros: rhino
hippopotamus: hippo; bug: caterpillar; rosette: flower; mouse face: mouse; rabbit face: rabbit, bunny; rabbit: bunny
koala: koala bear; panda: panda bear; paw prints: paw print, pawprints, paws; chicken: hen
rooster: cock, cockerel; hatching chick: chick; baby chick: chick; black bird: blackbird, crow, raven
turtle: tortoise; snake: serpent; dragon face: dragon
sauropod: brontosaurus, brachiosaurus, diplodocus; T-Rex: tyrannosaurus, tyrannosaurus rex, trex
spouting whale: whale; blowfish: pufferfish, puffer fish; spiral shell: shell, seashell, conch
shrimp: prawn; honeybee: bee, honey bee; lady beetle: ladybug, ladybird; cockroach: roach
spider web: spiderweb, cobweb, web; worm: earthworm; cricket: grasshopper; herb: herbs; microbe: germ, bacterium, bacteria
bouquet: bouquet of flowers, bunch of flowers, flowers; cherry blossom: sakura
white flower: flower; lotus: lotus flower; rose: red rose; blossom: flower
wilted flower: withered flower, wilted rose, dead flower; seedling: sprout, sapling
potted plant: pot plant, houseplant, plant; evergreen tree: evergreen, pine tree, pine, fir tree, fir
deciduous tree: tree; palm tree: palm; shamrock: clover; mushroom: toadstool
fallen leaf: fallen leaves, autumn leaf, autumn leaves, leaf, leaves; empty nest: nest, bird's nest
brown mushroom: mushroom; grapes: grape, bunch of grapes; tangerine: mandarin, orange
red apple: apple; green apple: apple; cherries: cherry; blueberries: blueberry; olive: olives
kiwi fruit: kiwi, kiwifruit; eggplant: aubergine; bell pepper: capsicum, pepper, sweet pepper
hot pepper: chili, chili pepper, chilli, chilli pepper, chile pepper, red pepper, pepper
leafy green: leafy greens, lettuce; peanuts: peanut; beans: bean; ginger root: ginger
pea pod: pea, peas, peapod; bread: loaf, loaf of bread; baguette bread: baguette, french bread
pancakes: pancake; cheese wedge: cheese; hamburger: burger; french fries: fries, chips
poultry leg: chicken leg, drumstick, chicken drumstick, turkey leg; pizza: pizza slice, slice of pizza
hot dog: hotdog; stuffed flatbread: kebab, gyro, doner kebab, stuffed pita
cooking: fried egg, frying pan, egg in a pan; green salad: salad; salt: salt shaker
canned food: can, tin, tin can; bento box: bento; rice ball: onigiri; cooked rice: rice, rice bowl, bowl of rice
curry rice: curry, curry and rice; spaghetti: pasta; fried shrimp: fried prawn, tempura, shrimp, prawn
steaming bowl: ramen, noodles, noodle soup, bowl of noodles, soup, bowl of soup
dumpling: dumplings, gyoza, jiaozi, potsticker; takeout box: take-out box, takeaway box, takeout
doughnut: donut; cookie: biscuit, chocolate chip cookie; birthday cake: cake
shortcake: cake, slice of cake, piece of cake, strawberry shortcake
chocolate bar: chocolate, bar of chocolate; candy: sweet, sweets; custard: pudding, flan, creme caramel
honey pot: honey, honey jar, pot of honey, jar of honey; baby bottle: milk bottle, bottle
hot beverage: hot drink, coffee, tea, cup of coffee, cup of tea; sake: sake bottle
wine glass: wine, glass of wine, red wine; cocktail glass: cocktail, martini, martini glass
tropical drink: cocktail, tropical cocktail; beer mug: beer, mug of beer, pint of beer
clinking glasses: champagne glasses, champagne, cheers; bubble tea: boba, boba tea
tumbler glass: tumbler, glass, whiskey, whisky, whiskey glass, whisky glass, glass of whiskey
beverage box: juice box, drink box, juice; mate: yerba mate; ice: ice cube, ice cubes
chopsticks: chopstick; kitchen knife: knife, chef's knife; jar: glass jar, empty jar
world map: map, map of the world; mount fuji: fuji, mt fuji
snow-capped mountain: mountain, snowy mountain, snowcapped mountain; camping: campsite, tent
desert island: island, tropical island; building construction: construction site, construction, crane
brick: bricks; classical building: temple, greek temple; rock: stone, boulder; wood: log, logs, timber, lumber; national park: park
derelict house: abandoned house, ruined house; house: home; convenience store: store, shop
department store: store, shop
office building: office, office block
Japanese castle: castle; wedding: wedding chapel, chapel, church; Tokyo tower: tower; hindu temple: temple
shinto shrine: shrine, torii, torii gate; fountain: water fountain; foggy: fog
cityscape: city, skyline, city skyline; love hotel: hotel; hot springs: hot spring, onsen; carousel horse: carousel, merry-go-round
playground slide: slide; roller coaster: rollercoaster; circus tent: circus, big top
barber pole: barber's pole; locomotive: steam locomotive, steam train, steam engine, train
railway car: train car, railway carriage, train carriage; high-speed train: bullet train, train
bullet train: high-speed train, train; metro: subway, subway train, underground, train
station: train station, railway station, train; light rail: light rail train, train; tram: streetcar
mountain railway: mountain train; tram car: tramcar, tram, streetcar, trolley; monorail: monorail train
oncoming bus: bus; trolleybus: trolley bus; minibus: van; fire engine: fire truck, firetruck
police car: patrol car; taxi: cab, taxicab; oncoming taxi: taxi, cab, taxicab; automobile: car
oncoming automobile: car, automobile; pickup truck: pickup, pick-up truck, truck
delivery truck: truck, delivery van, lorry; racing car: race car, formula one car
articulated lorry: truck, lorry, semi-truck, semi truck, semi; motorcycle: motorbike
motor scooter: scooter, moped; kick scooter: scooter; manual wheelchair: wheelchair
motorized wheelchair: wheelchair, electric wheelchair, mobility scooter; bicycle: bike
auto rickshaw: rickshaw, tuk-tuk, tuk tuk; roller skate: roller skates; motorway: highway, freeway, road
railway track: railroad track, train track, railway tracks, train tracks, railway, railroad
oil drum: oil barrel, barrel; fuel pump: gas pump, petrol pump, gas station, petrol station
wheel: tire, tyre; construction: construction barrier, barrier, roadblock
ring buoy: lifebuoy, life preserver, life buoy, lifebelt, life ring, lifesaver
sailboat: sailing boat, yacht; passenger ship: ship, cruise ship; ferry: ferry boat
motor boat: motorboat, boat; speedboat: speed boat, motorboat; airplane: plane, aeroplane, jet, aircraft
small airplane: airplane, plane, aeroplane, small plane; aerial tramway: cable car, gondola
airplane departure: departure, takeoff, departing airplane, departing plane, airplane, plane
airplane arrival: arrival, landing, landing airplane, landing plane, arriving airplane, airplane, plane
mountain cableway: cable car, gondola, cableway; rocket: rocket ship, spaceship; flying saucer: ufo
suspension railway: suspended railway; bellhop bell: service bell, reception bell, hotel bell, bell
luggage: suitcase, baggage; hourglass done: hourglass, sand timer, sandglass
watch: wristwatch; alarm clock: clock; stopwatch: stop watch; timer clock: timer
mantelpiece clock: clock, mantel clock; ringed planet: saturn, planet; glowing star: star, shining star
shooting star: falling star, meteor; milky way: galaxy, night sky, starry sky; tornado: twister
wind face: wind, wind blowing face; cyclone: spiral, hurricane, typhoon; closed umbrella: umbrella
high voltage: lightning, lightning bolt, thunderbolt; fire: flame; water wave: wave, ocean wave
droplet: drop, water drop, drop of water, water droplet, water
jack-o-lantern: jack o'lantern, jack o' lantern, pumpkin, halloween pumpkin, carved pumpkin
fireworks: firework; firecracker: firecrackers, dynamite; sparkles: sparkle, stars
party popper: confetti, confetti popper; Japanese dolls: dolls, hina dolls; pine decoration: kadomatsu
carp streamer: koinobori, carp streamers; wind chime: wind chimes, wind bell; ribbon: bow
red envelope: red packet, hongbao; wrapped gift: gift, present, wrapped present, gift box
reminder ribbon: ribbon, awareness ribbon; admission tickets: tickets, ticket, admission ticket
military medal: medal; sports medal: medal, gold medal; trophy: cup; soccer ball: football, soccer
american football: football; rugby football: rugby ball, rugby; flying disc: frisbee
tennis: tennis ball, tennis racket, tennis racquet; bowling: bowling ball, bowling pins
cricket game: cricket, cricket bat; field hockey: hockey, hockey stick, field hockey stick
ice hockey: hockey, hockey stick, ice hockey stick; lacrosse: lacrosse stick
ping pong: table tennis, ping-pong, ping pong paddle, table tennis bat; boxing glove: boxing gloves
badminton: badminton racket, badminton racquet, shuttlecock; goal net: goal, net
ice skate: ice skates, skate; fishing pole: fishing rod; diving mask: snorkel, scuba mask
running shirt: tank top, singlet, running vest, shirt; skis: ski; sled: sledge, sleigh, toboggan
curling stone: curling, curling rock; bullseye: target, bull's-eye, dartboard, bull's eye; yo-yo: yoyo
water pistol: water gun, gun, pistol, handgun, revolver, squirt gun; magic wand: wand
video game: game controller, controller, gamepad, video game controller; game die: die, dice
slot machine: fruit machine; puzzle piece: jigsaw piece, jigsaw puzzle piece, jigsaw, puzzle
teddy bear: teddy, stuffed bear; piñata: pinata; mirror ball: disco ball
nesting dolls: nesting doll, matryoshka, matryoshka doll, russian doll, russian dolls, matryoshka dolls
spade suit: spade, spades; heart suit: heart, hearts; diamond suit: diamond, diamonds
club suit: club, clubs; chess pawn: pawn; joker: joker card
performing arts: theater masks, theatre masks, masks, theater, theatre, drama masks
framed picture: picture, painting, picture frame, framed painting
artist palette: palette, paint palette, painter's palette, artist's palette
thread: spool of thread, spool; sewing needle: needle; yarn: ball of yarn; knot: rope
glasses: eyeglasses, spectacles; lab coat: white coat; safety vest: vest; necktie: tie, shirt and tie
t-shirt: tshirt, shirt, tee shirt; jeans: pants, trousers; gloves: glove, mittens; coat: jacket; socks: sock
sari: saree; one-piece swimsuit: swimsuit, bathing suit; briefs: underwear, underpants
woman’s clothes: blouse, women's clothes, shirt; purse: coin purse; handbag: purse, bag
clutch bag: clutch, pouch, bag, purse; shopping bags: shopping bag, bags
backpack: rucksack, schoolbag, bookbag; thong sandal: flip-flop, flip flop, flip-flops, flip flops, sandal
man’s shoe: shoe, dress shoe; running shoe: sneaker, shoe, trainer, athletic shoe
hiking boot: boot; flat shoe: shoe, ballet flat, flat; woman’s sandal: sandal; woman’s boot: boot
high-heeled shoe: high heel, high heels, heel, stiletto, shoe
ballet shoes: ballet shoe, ballet slippers; hair pick: comb, pick, afro comb, hair comb
woman’s hat: hat; top hat: hat; graduation cap: mortarboard, graduation hat
billed cap: cap, baseball cap; military helmet: helmet, army helmet; prayer beads: rosary, beads
ring: diamond ring, engagement ring; gem stone: gem, gemstone, diamond, jewel
muted speaker: mute, muted, speaker; loudspeaker: megaphone, bullhorn; megaphone: bullhorn
postal horn: post horn, horn; musical score: sheet music, music score, score, treble clef
musical note: note, music note; musical notes: notes, music notes; level slider: slider
studio microphone: microphone, mic; control knobs: knobs, knob; microphone: mic
headphone: headphones; saxophone: sax; violin: fiddle; guitar: electric guitar, acoustic guitar
musical keyboard: piano, keyboard, piano keys; long drum: drum, conga, conga drum; maracas: maraca
mobile phone: cell phone, cellphone, phone, smartphone; telephone: phone; pager: beeper
telephone receiver: phone receiver, receiver, handset, phone, telephone; fax machine: fax
low battery: battery; electric plug: plug, power plug; laptop: laptop computer, computer
desktop computer: computer, desktop, monitor, pc; keyboard: computer keyboard; computer mouse: mouse
computer disk: disk, minidisc, minidisk, disc; floppy disk: floppy, diskette; dvd: disc, disk
optical disk: cd, compact disc, optical disc, disc, disk; film frames: film, film strip, filmstrip
movie camera: film camera; film projector: projector, movie projector; television: tv
clapper board: clapperboard, clapboard, film slate; video camera: camcorder
videocassette: vhs, vhs tape, videotape, video tape, video cassette; light bulb: lightbulb, bulb
flashlight: torch; diya lamp: diya, oil lamp, lamp; closed book: book; open book: book
green book: book; blue book: book; orange book: book; books: stack of books, pile of books
rolled-up newspaper: newspaper, rolled newspaper; label: tag; money bag: bag of money, moneybag
coin: gold coin; yen banknote: yen, yen note, yen bill, banknote
dollar banknote: dollar, dollar bill, dollars, banknote; euro banknote: euro, euro note, euro bill, banknote
pound banknote: pound, pound note, pounds, banknote; envelope: letter; e-mail: email, mail
incoming envelope: envelope, incoming mail; outbox tray: outbox; inbox tray: inbox
package: parcel, box, cardboard box; postbox: mailbox, post box, letterbox, letter box
black nib: nib, pen nib; fountain pen: pen; pen: ballpoint pen; paintbrush: brush, paint brush
memo: note, pencil and paper, paper and pencil; file folder: folder; tear-off calendar: calendar
spiral notepad: notepad, notebook, spiral notebook; spiral calendar: calendar; card index: rolodex
chart increasing: chart, graph, line chart, line graph, increasing chart
chart decreasing: chart, graph, line chart, line graph, decreasing chart; bar chart: bar graph, chart, graph
pushpin: push pin, thumbtack, drawing pin, pin; round pushpin: pushpin, push pin, pin
paperclip: paper clip; linked paperclips: paperclips, paper clips; straight ruler: ruler
triangular ruler: ruler, set square, triangle; file cabinet: filing cabinet
wastebasket: trash can, waste basket, garbage can, bin, trash bin, dustbin; axe: ax, hatchet
locked: lock, padlock, closed lock; unlocked: lock, padlock, open lock; old key: key
pick: pickaxe, pickax; dagger: knife; crossed swords: swords; wrench: spanner; gear: cog, cogwheel
alembic: flask, distillation flask; carpentry saw: saw, handsaw, hand saw; clamp: vise, vice; balance scale: scale, scales, balance
white cane: cane; link: chain, links, chain link; chains: chain; magnet: horseshoe magnet
dna: double helix, dna helix; satellite antenna: satellite dish, antenna; syringe: needle, injection
pill: pills, capsule; adhesive bandage: bandage, band-aid, bandaid, plaster; crutch: crutches
x-ray: xray; elevator: lift; shower: shower head; bathtub: bath, tub; mouse trap: mousetrap
lotion bottle: lotion, bottle; bucket: pail; soap: bar of soap; bubbles: bubble, soap bubbles
shopping cart: cart, shopping trolley, trolley; fire extinguisher: extinguisher
headstone: gravestone, tombstone, grave; coffin: casket; funeral urn: urn; placard: sign, protest sign
nazar amulet: nazar, evil eye, amulet; hamsa: hamsa hand, hand of fatima; moai: moai statue, easter island statue, stone head
identification card: id card, identity card, id
"""

# Each line: names whose drawings, or names, may be taken for each other. (Names that share a word or
# an accepted answer are confusable too.)
_CONFUSABLE = """
monkey face, monkey, gorilla, orangutan, sloth
dog face, dog, guide dog, service dog, poodle, wolf, fox, raccoon, bear
cat face, cat, black cat, lion, tiger face, tiger, leopard
horse face, horse, donkey, unicorn, zebra, moose, deer, carousel horse, camel, llama
cow face, cow, ox, water buffalo, bison, ram, ewe, goat, boar, pig, pig face, pig nose
elephant, mammoth; rhinoceros, hippopotamus, boar
mouse face, mouse, rat, hamster, chipmunk, beaver, otter, badger, skunk, raccoon, hedgehog, rabbit
camel, two-hump camel, llama; bear, polar bear, panda, koala, teddy bear, hamster
chicken, rooster, turkey, hatching chick, baby chick, duck, bird, goose, swan, dove, egg
bird, dove, eagle, black bird, parrot, phoenix, peacock, dodo, owl, flamingo, feather, wing
crocodile, lizard, dragon, dragon face, sauropod, T-Rex, snake, turtle, frog
spouting whale, whale, dolphin, shark, seal, fish, tropical fish, blowfish, carp streamer
octopus, squid, jellyfish; crab, lobster, shrimp, scorpion, fried shrimp; spiral shell, snail
bug, ant, honeybee, beetle, lady beetle, cricket, cockroach, fly, mosquito, spider, worm, scorpion
bouquet, cherry blossom, white flower, lotus, rosette, rose, wilted flower, hibiscus, sunflower, \
blossom, tulip, hyacinth
seedling, potted plant, herb, shamrock, leafy green, maple leaf, fallen leaf, cactus, broccoli
evergreen tree, deciduous tree, palm tree, Christmas tree, tanabata tree, national park, \
pine decoration, broccoli, desert island
melon, watermelon, tangerine, lemon, lime, mango, peach, coconut, olive, pear, potato, avocado
red apple, green apple, pear, peach, tomato, cherries, mango, tangerine; grapes, blueberries, olive
peach, red apple, tangerine, tomato, strawberry; hot pepper, bell pepper, tomato, carrot
cucumber, pea pod, hot pepper, eggplant, avocado, lime
potato, ginger root, chestnut, peanuts, beans, olive, coconut, bread, egg, onion, garlic
bread, baguette bread, croissant, flatbread, bagel, pretzel, doughnut, cookie
pancakes, waffle, butter, cheese wedge
taco, burrito, stuffed flatbread, sandwich, tamale, hamburger, hot dog, falafel
green salad, cooked rice, curry rice, steaming bowl, spaghetti, fondue, shaved ice, ice cream, \
custard, bento box, canned food, cooking, popcorn
rice ball, rice cracker, falafel, dumpling, sushi, fortune cookie
dango, oden, fried shrimp, lollipop, candy
birthday cake, shortcake, cupcake, pie, custard, cheese wedge, chocolate bar, ice cream
wine glass, cocktail glass, tropical drink, clinking glasses, tumbler glass, pouring liquid, \
bubble tea, beverage box, beer mug, mate, hot beverage, sake, baby bottle, teapot, ice
jar, amphora, honey pot, canned food, funeral urn, teapot, salt, sake, lotion bottle, baby bottle
kitchen knife, dagger, crossed swords, carpentry saw, razor, spoon
snow-capped mountain, mountain, volcano, mount fuji, camping, desert, national park, \
desert island, mountain railway, sunrise, sunset, tent
stadium, classical building, building construction, hut, houses, derelict house, house, \
office building, post office, hospital, bank, hotel, love hotel, convenience store, school, \
department store, factory, Japanese castle, castle, wedding, church, mosque, hindu temple, \
synagogue, shinto shrine, kaaba, cityscape, sunset, foggy, Tokyo tower, station
stadium, circus tent, tent, camping; brick, rock, wood, construction
sunrise, sunset, sun, foggy, cityscape, fog, rainbow, milky way
locomotive, railway car, high-speed train, bullet train, train, metro, light rail, station, tram, \
monorail, mountain railway, tram car, bus, oncoming bus, trolleybus, suspension railway, minibus
bus, oncoming bus, trolleybus, minibus, ambulance, delivery truck, articulated lorry, fire engine
police car, taxi, oncoming taxi, automobile, oncoming automobile, racing car, pickup truck, minibus
pickup truck, delivery truck, articulated lorry, tractor, auto rickshaw
manual wheelchair, motorized wheelchair; motorcycle, motor scooter, kick scooter, bicycle, skateboard
railway track, motorway, ladder, playground slide; stop sign, bus stop, placard
sailboat, canoe, speedboat, passenger ship, ferry, motor boat, ship
airplane, small airplane, airplane departure, airplane arrival, satellite, rocket
suspension railway, mountain cableway, aerial tramway, monorail, mountain railway, tram car
watch, alarm clock, stopwatch, timer clock, mantelpiece clock, compass, hourglass done
star, glowing star, shooting star, sparkles, comet, milky way, sun, sparkler, fireworks, snowflake
cloud, tornado, fog, foggy, wind face, cyclone, water wave; droplet, bubbles; fire, comet, phoenix
baseball, softball, tennis, volleyball, basketball, soccer ball, crystal ball, mirror ball, yarn
american football, rugby football, soccer ball; ice skate, roller skate, skis, sled, skateboard
field hockey, ice hockey, lacrosse, cricket game, ping pong, badminton, tennis
military medal, sports medal, rosette, trophy, coin, bullseye; stop sign, bullseye
ribbon, reminder ribbon, wrapped gift, rosette; admission tickets, ticket
party popper, confetti ball, balloon, fireworks, sparkler, firecracker, bomb, candle
spade suit, heart suit, diamond suit, club suit, joker, shamrock; boxing glove, gloves
spade suit, black nib; thread, yarn, knot, sewing needle, chains, hook
glasses, sunglasses, goggles, diving mask
lab coat, safety vest, coat, t-shirt, running shirt, woman’s clothes, dress, kimono, sari, necktie
one-piece swimsuit, briefs, shorts, bikini, jeans, running shirt, socks
purse, handbag, clutch bag, shopping bags, backpack, briefcase, luggage, money bag, toolbox
thong sandal, man’s shoe, running shoe, hiking boot, flat shoe, high-heeled shoe, woman’s sandal, \
ballet shoes, woman’s boot, ice skate, roller skate, socks
woman’s hat, top hat, graduation cap, billed cap, military helmet, crown
ring, gem stone, diamond suit, prayer beads; joystick, video game
muted speaker, loudspeaker, megaphone, postal horn, trumpet, bell, bellhop bell, saxophone
musical score, musical note, musical notes; level slider, control knobs
guitar, violin, banjo; drum, long drum, oil drum; flute, chopsticks
mobile phone, telephone, telephone receiver, pager, fax machine, battery, low battery, printer
laptop, desktop computer, television, window, framed picture; keyboard, musical keyboard
computer mouse, trackball; computer disk, floppy disk, optical disk, dvd, videocassette
movie camera, camera, video camera, film projector, film frames, clapper board, radio, videocassette
candle, light bulb, flashlight, diya lamp, lipstick
closed book, open book, green book, blue book, orange book, books, notebook, ledger, \
spiral notepad, bookmark tabs, calendar, file folder, card index
scroll, newspaper, rolled-up newspaper, bookmark tabs, bookmark, label, memo, receipt, clipboard, \
placard, identification card, spiral notepad, spiral calendar, tear-off calendar, calendar, ledger
coin, money bag, yen banknote, dollar banknote, euro banknote, pound banknote, credit card, receipt, \
identification card
envelope, e-mail, incoming envelope, red envelope; outbox tray, inbox tray, printer, fax machine
package, wrapped gift, takeout box, bento box, toolbox, file cabinet; wastebasket, bucket, basket
pencil, black nib, fountain pen, pen, paintbrush, crayon, memo, screwdriver, magic wand, lipstick, \
toothbrush, white cane, crutch
chart increasing, chart decreasing, bar chart, level slider; pushpin, round pushpin
paperclip, linked paperclips, link, chains, broken chain, safety pin
straight ruler, triangular ruler; locked, unlocked; key, old key; hammer, axe, pick, wrench, gear
alembic, test tube, petri dish, microscope, telescope, satellite antenna; syringe, thermometer, pill
shower, bathtub, toilet, soap, bubbles, sponge, plunger; door, window, mirror, elevator, bed, chair
headstone, coffin, moai, funeral urn; hot springs, hot beverage, steaming bowl; shield, police car
egg, coconut, rock, potato; nazar amulet, bullseye, optical disk; broom, paintbrush, toothbrush, crayon
"""

# Names for pictures of several icons, which say plainly what is drawn; "singular/plural" where the
# plural is irregular.
_SCENE_NAMES = """
monkey, gorilla, dog, wolf/wolves, cat, lion, tiger, leopard, horse, zebra, unicorn, cow, pig, goat,
camel, llama, giraffe, elephant, rat, hamster, rabbit, hedgehog, bat, bear, koala, panda, kangaroo,
turkey, rooster, penguin, eagle, duck, swan, owl, flamingo, peacock, parrot, frog, crocodile, turtle,
lizard, snake, dragon, dolphin, shark, octopus, crab, lobster, snail, butterfly, ant, spider,
scorpion, mosquito/mosquitoes, rose, sunflower, tulip, cactus, shamrock, maple leaf/maple leaves,
palm tree, mushroom, watermelon, lemon, banana, pineapple, mango, pear, peach, strawberry,
tomato/tomatoes, avocado, eggplant, potato/potatoes, carrot, onion, pretzel, croissant, hamburger,
hot dog, sandwich, taco, burrito, doughnut, cookie, birthday cake, cupcake, lollipop, teapot,
beer mug, spoon, kitchen knife/kitchen knives, compass, volcano/volcanoes, tent,
ferris wheel, bus, ambulance, fire engine, taxi, tractor, motorcycle, bicycle, skateboard, anchor,
sailboat, canoe, helicopter, rocket, parachute, watch, alarm clock, stopwatch, thermometer, star,
rainbow, umbrella, snowflake, snowman/snowmen, balloon, trophy, soccer ball, baseball, basketball,
volleyball, boxing glove, kite, yo-yo, crystal ball, magic wand, joystick, slot machine, teddy bear,
puzzle piece, t-shirt, dress, kimono, bikini, handbag, backpack, crown, top hat,
graduation cap, lipstick, ring, megaphone, bell, microphone, radio, saxophone, trumpet, accordion,
guitar, violin, banjo, drum, mobile phone, telephone, battery, printer, floppy disk, camera,
video camera, candle, light bulb, flashlight, newspaper, coin, credit card, envelope, package,
pencil, paintbrush, briefcase, calendar, clipboard, pushpin, paperclip, key, hammer, axe, bomb,
boomerang, screwdriver, gear, magnet, ladder, microscope, telescope, syringe, stethoscope,
door, bed, chair, toilet, bathtub, broom, basket, bucket, toothbrush, shopping cart, cigarette, coffin
"""


def accepted_answers(name: str) -> tuple[str, ...]:
    """Return the accepted names of an object, the CLDR name first."""
    plain = name.replace("’", "'")
    return tuple(dict.fromkeys((name, plain, *_synonyms().get(name, ()))))


def are_confusable(name: str, other: str) -> bool:
    """Return whether two names must not be in one question or picture."""
    if name in _confusable().get(other, ()):
        return True
    own, others = accepted_answers(name), accepted_answers(other)
    return bool(set(own) & set(others) or _words(own) & _words(others))


def scene_names() -> tuple[str, ...]:
    """Return the names for pictures of several icons."""
    return tuple(_plurals())


def plural_of(name: str) -> str:
    """Return the plural of one of `scene_names`."""
    return _plurals()[name]


def _regular_plural(name: str) -> str:
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "sh", "ch", "x")) else f"{name}s"


def _words(names: tuple[str, ...]) -> set[str]:
    """Return the words of names, without those that say nothing about a drawing."""
    words = {word for name in names for word in name.casefold().replace("-", " ").split()}
    return words - {"of", "the", "and", "a", "in", "man’s", "man's", "woman’s", "woman's"}


@cache
def _synonyms() -> dict[str, tuple[str, ...]]:
    entries = (entry.split(": ") for entry in _entries(_SYNONYMS))
    return {name: tuple(others.split(", ")) for name, others in entries}


@cache
def _confusable() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in _entries(_CONFUSABLE):
        names = entry.split(", ")
        for name in names:
            found.setdefault(name, set()).update(names)
    return found


@cache
def _plurals() -> dict[str, str]:
    pairs = (entry.strip().split("/") for entry in _SCENE_NAMES.replace("\n", " ").split(","))
    return {name: own[0] if own else _regular_plural(name) for name, *own in pairs}


def _entries(table: str) -> list[str]:
    return [entry for line in table.strip().splitlines() for entry in line.split("; ")]

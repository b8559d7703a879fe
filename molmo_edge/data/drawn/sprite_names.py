"""Which pictures a name may show: emoji (drawn in several styles) and photo stamps, by everyday English noun.

COCO's classes keep COCO's own names, so that drawn scenes and photographs train the same word. Left out on purpose:
names that look alike at 40 pixels, people with poses, flags, faces, and the mouse that runs (COCO's is a computer's).
"""

from __future__ import annotations

# NAME: emoji and/or paths of Tux Paint stamps (folder/stem, enough of it to be unique), separated by blanks. An
# indented line continues the one above.
_TABLE = """
dog: 🐕 🐶 🐩 dogs/dog dogs/dingo
cat: 🐈 🐱 halloween/blackcat
horse: 🐎 🐴 equines/horse
sheep: 🐑 🐏 bovines/sheep bovines/ram bovines/sheep_lamb
cow: 🐄 🐮 🐂 bovines/cow bovines/cow_white bovines/bull
elephant: 🐘 mammals/elephant
bear: 🐻 bears/bear bears/european-bear
zebra: 🦓 equines/zebra
giraffe: 🦒 mammals/giraffe
bird: 🐦 birds/blackbird birds/crow birds/lark easter/bluebird birds/cuckoo birds/magpie
lion: 🦁 cats/lion cats/lion-2 cartoon/lion
tiger: 🐅 🐯 cats/tiger cats/tiger_sumatran
monkey: 🐒 🐵 apes/chimp
gorilla: 🦍 apes/gorilla
panda: 🐼
koala: 🐨 marsupials/koala
kangaroo: 🦘 marsupials/kangaroo
rabbit: 🐇 🐰 rodents/rabbit-2 rodents/rabbit mammals/rabbit_little easter/bunny
fox: 🦊 dogs/fox
wolf: 🐺
raccoon: 🦝
pig: 🐖 🐷 mammals/pig mammals/pig_golden mammals/pig_golden2
goat: 🐐 bovines/goat bovines/mountaingoat
camel: 🐪 🐫 camel/camel camel/dromedary
deer: 🦌 deer/deer deer/doe deer/caribou deer/wapiti
donkey: equines/donkey equines/donkey_eating
hippo: 🦛 mammals/hippopotamus
rhino: 🦏 mammals/rhino_black
hamster: 🐹
rat: 🐀 rodents/rat
squirrel: 🐿 rodents/squirrel
beaver: 🦫 rodents/beaver rodents/marmot
hedgehog: 🦔 mammals/hedgehog
bat: 🦇 halloween/bat_left
unicorn: 🦄
dragon: 🐉 🐲
dinosaur: 🦕 🦖
crocodile: 🐊
lizard: 🦎 lizards/iguana
snake: 🐍
frog: 🐸 amphibians/frog-1 amphibians/frog
turtle: 🐢
whale: 🐋 🐳 aquatic/whale aquatic/orca
dolphin: 🐬 aquatic/dolphin
shark: 🦈
seal: 🦭 aquatic/sea_lion
fish: 🐟 🐠 fish/bluegroper fish/butterflyfish fish/clownfish fish/coraltrout fish/moonwrasse
octopus: 🐙
crab: 🦀
lobster: 🦞 fish/lobster
shrimp: 🦐 fish/shrimp
shell: 🐚
snail: 🐌 cartoon/snail cartoon/snail2
butterfly: 🦋 cartoon/butterfly
ant: 🐜
bee: 🐝 insects/bee insects/hornet
ladybug: 🐞 cartoon/ladybug-2 cartoon/ladybug
fly: 🪰 insects/fly cartoon/fly
spider: 🕷 halloween/spider
chicken: 🐔 🐓 birds/chicken_profile birds/hen birds/rooster
chick: 🐤 🐥 easter/chick
duck: 🦆 birds/duck birds/drake household/rubberduck
swan: 🦢 birds/gander
owl: 🦉 birds/owl
eagle: 🦅
parrot: 🦜 birds/adelaide-rosella birds/rainbow-lorikeet
peacock: 🦚 birds/peacock
penguin: 🐧 birds/penguin birds/little-penguin birds/magellanic_penguin cartoon/tux
flamingo: 🦩 birds/pink_flamingo
toucan: birds/tucan
pigeon: 🕊 birds/pigeon
apple: 🍎 🍏 fruit/apple_fuji fruit/apple_granny_smith fruit/apple_green fruit/apple_red cartoon/apple
banana: 🍌 fruit/banana cartoon/banana
orange: 🍊 fruit/orange fruit/mandarine fruit/orange_seville cartoon/orange
lemon: 🍋 fruit/lemon cartoon/lemon
pear: 🍐 fruit/pear cartoon/pear
peach: 🍑 fruit/apricot cartoon/peach
cherry: 🍒 fruit/Cherry_Stella cartoon/cherries
strawberry: 🍓 fruit/strawberry fruit/Strawberry2 cartoon/strawberry
blueberry: 🫐 cartoon/blueberry
grapes: 🍇 fruit/grapes cartoon/grapes
pineapple: 🍍 fruit/pineapple cartoon/pineapple
watermelon: 🍉
mango: 🥭 fruit/mango
kiwi: 🥝 fruit/kiwi
coconut: 🥥
avocado: 🥑 fruit/avocado
tomato: 🍅 vegetables/tomato
eggplant: 🍆 vegetables/eggplant
cucumber: 🥒
broccoli: 🥦 vegetables/broccoli
carrot: 🥕 vegetables/carrot
corn: 🌽 vegetables/corn
potato: 🥔 vegetables/potato vegetables/yam
onion: 🧅 vegetables/onion
garlic: 🧄 vegetables/garlic
lettuce: 🥬 vegetables/lettuce vegetables/redlettuce
bell pepper: 🫑 vegetables/pepper vegetables/yellowpepper
chili pepper: 🌶 vegetables/chilepepper
mushroom: 🍄 vegetables/mushroom mushrooms/cep-1 mushrooms/cep
pumpkin: 🎃 vegetables/pumpkin_small halloween/jackolantern_mean
bread: 🍞
baguette: 🥖
croissant: 🥐
pretzel: 🥨
pancake: 🥞
waffle: 🧇
cheese: 🧀
egg: 🥚
pizza: 🍕 food/pizza
hamburger: 🍔
hot dog: 🌭
sandwich: 🥪
french fries: 🍟
taco: 🌮
salad: 🥗
spaghetti: 🍝
sushi: 🍣
popcorn: 🍿
cake: 🎂 🍰 dessert/cartoon/birthday_cake dessert/cartoon/pink_cake
cupcake: 🧁
pie: 🥧 christmas/Mince_Pie
donut: 🍩
cookie: 🍪
ice cream: 🍦 🍨
chocolate: 🍫
candy: 🍬 christmas/hard_candy
lollipop: 🍭
candy cane: christmas/Candy_cane_photo_1 christmas/Candy_cane_photo_2 christmas/candy_cane
milk: 🥛
beer: 🍺
wine glass: 🍷
cocktail: 🍸 🍹
bottle: 🍾 🍼 🍶 🧴
cup: ☕ 🍵 🥤 dishes/mug
bowl: 🥣 🍜
teapot: 🫖 dishes/teapot
kettle: household/kettle
plate: 🍽
knife: 🔪
spoon: 🥄
chopsticks: 🥢
salt shaker: 🧂
car: 🚗 🚙 🚘 auto/beetle auto/sedan auto/sportscar2
taxi: 🚕 🚖
police car: 🚓 🚔
race car: 🏎 race/indycar
bus: 🚌 🚍 masstransit/cartoon/double_decker_bus masstransit/green_korean_bus
ambulance: 🚑
fire truck: 🚒 emergency/cartoon/fire_engine emergency/firetruck
truck: 🚚 🚛 🛻 auto/truck construction/cartoon/terex vehicles/garbagetruck
tractor: 🚜 cartoon/tux_tractor
bicycle: 🚲
motorcycle: 🏍 🛵
scooter: 🛴
skateboard: 🛹
roller skate: 🛼
train: 🚂 🚆 🚄 🚅 cartoon/toy_train
airplane: ✈ 🛩 planes/747 cartoon/plane
helicopter: 🚁 cartoon/eddieCopter
rocket: 🚀
ufo: 🛸
satellite: 🛰
hot air balloon: flight/balloon360
boat: ⛵ 🚤 🛥 🚢 ⛴ ship/chineseJunk cartoon/tugboat
anchor: ⚓
traffic light: 🚦 🚥 roadsigns/stoplight_01_red roadsigns/stoplight_02_yellow roadsigns/stoplight_03_green
stop sign: 🛑 roadsigns/stop
traffic cone: roadsigns/traffic_cone
house: 🏠 🏡 cartoon/swisshome cartoon/pinkhome
castle: 🏰 🏯 cartoon/fairytale_castle cartoon/fortress
church: ⛪ cartoon/cathedral
tent: ⛺ houses/cartoon/tent cartoon/medieval_tent
windmill: cartoon/windmill
fountain: ⛲ cartoon/fountain
ferris wheel: 🎡
mountain: 🏔 ⛰
volcano: 🌋
chair: 🪑
couch: 🛋
bed: 🛏
toilet: 🚽 household/toilet
bathtub: 🛁
door: 🚪
ladder: 🪜
bucket: 🪣
broom: 🧹
basket: 🧺
soap: 🧼
toilet paper: 🧻
trash can: 🗑 household/garbagecan household/wheelie_bin household/home_compost_bin
light bulb: 💡 household/Lightbulb
candle: 🕯 seasonal/candle hanukkah/holiday_candle
flashlight: 🔦
potted plant: 🪴
vase: 🏺
clock: 🕐 🕒 🕔 🕗 🕙 🕠 🕥
alarm clock: ⏰
watch: ⌚
hourglass: ⌛
laptop: 💻
mouse: 🖱
keyboard: ⌨
printer: 🖨
cell phone: 📱
telephone: ☎
tv: 📺
radio: 📻
camera: 📷 📸 hobbies/camera_35mm
video camera: 📹 🎥
headphones: 🎧
microphone: 🎤
battery: 🔋
game controller: 🎮
magnifying glass: 🔍 🔎
microscope: 🔬
telescope: 🔭
binoculars: hobbies/binoculars
compass: 🧭
globe: 🌍 🌎 planets/3_earth
book: 📕 📗 📘 📙 📖
notebook: 📓
newspaper: 📰
envelope: ✉
mailbox: 📫 📪 📮 town/uk_post_box town/usps_mailbox
box: 📦
calendar: 📅
pencil: ✏
pen: 🖊 🖋
crayon: 🖍
paintbrush: 🖌 tools/paintbrush_large
palette: 🎨
ruler: 📏
paperclip: 📎
scissors: ✂ arttools/scissors_small_closed arttools/scissors_small_open
hammer: 🔨 tools/hammer tools/mallet_metal
wrench: 🔧 tools/wrench tools/wrench_adjustable tools/wrench_plumbers
screwdriver: 🪛
saw: 🪚 tools/saw
axe: 🪓
shovel: tools/spade
toolbox: 🧰 tools/toolbox
magnet: 🧲
key: 🔑 🗝 household/key
lock: 🔒 🔓
gear: ⚙
bell: 🔔
fire extinguisher: 🧯
bomb: 💣
shield: 🛡
sword: 🗡
crown: 👑
ring: 💍
diamond: 💎
coin: 🪙
money bag: 💰
credit card: 💳
umbrella: ☂ ☔ 🌂
backpack: 🎒
handbag: 👜 👛
briefcase: 💼
suitcase: 🧳
shopping cart: 🛒
glasses: 👓
sunglasses: 🕶
tie: 👔
t-shirt: 👕 clothes/t_tshirt clothes/t_poloshirt
jacket: 🧥 clothes/t_jacket
dress: 👗
pants: 👖 clothes/t_pants
shorts: 🩳
sock: 🧦 clothes/t_sock christmas/stocking
shoe: 👟 👞
boot: 👢 🥾
high heel: 👠
hat: 👒 🎩 hats/blue_fedora hats/green_fedora hats/sombrero hats/tophat
cap: 🧢 clothes/t_baseballcap
glove: 🧤 clothes/t_glove
scarf: 🧣 clothes/t_scarf
teddy bear: 🧸 bears/cartoon/teddy_bear toys/edward_bear
doll: 🪆 people/toys/grannysmith
kite: 🪁
balloon: 🎈
gift: 🎁
ribbon: 🎀
yo-yo: 🪀
puzzle piece: 🧩
dice: 🎲
sports ball: ⚽ 🏀 ⚾ 🏐 🏈 sports/basketball cartoon/volleyball sports/cricketball sports/soccer
    sports/tennis_ball
frisbee: 🥏
tennis racket: sports/tennis_racket
boxing glove: 🥊
skis: 🎿
sled: 🛷
target: 🎯
trophy: 🏆 sports/trophy_cup
guitar: 🎸 string/guitar2 string/guitar_classical string/guitar_electric
violin: 🎻 string/violin string/cello
piano: 🎹
trumpet: 🎺 brass/trumpet
saxophone: 🎷
drum: 🥁 percussion/drum_tomtom_floor
syringe: 💉 medical/syringe
pill: 💊
bandage: 🩹 medical/bandage_adhesive
stethoscope: 🩺 medical/stethoscope
thermometer: 🌡 medical/mercurythermometer
toothbrush: 🪥
tooth: 🦷 medical/tooth
bone: 🦴
brain: 🧠
skull: 💀
eye: 👁 body_parts/eye
hand: ✋
flower: 🌸 🌼 🌺 flowers/flower1 flowers/flower10 flowers/flower2 flowers/flower3 flowers/flower5
    flowers/flower6 flowers/iris flowers/red-gazania flowers/anemone_red
rose: 🌹 flowers/rose
tulip: 🌷
sunflower: 🌻
tree: 🌳 trees/holm_oak trees/birch
pine tree: 🌲
palm tree: 🌴 trees/liberia-palm
christmas tree: 🎄 christmas/Christmas_Tree_photo christmas/tree
cactus: 🌵
leaf: 🍁 🍂
sun: ☀ 🌞
moon: 🌙 🌕 moon/moon_crescent moon/moon_full
star: ⭐ 🌟
cloud: ☁
rainbow: 🌈
lightning: ⚡ naturalforces/lightningbolt
snowflake: ❄
snowman: ☃ ⛄ cartoon/snowman
fire: 🔥
heart: ❤ 💙 💚 💛 💜 🧡
robot: 🤖
ghost: 👻
alien: 👽
santa: 🎅 christmas/Santa
person: 🧍 🚶 👨 👩
baby: 👶
flag: 🚩
"""

# A word whose picture another, narrower name also shows: where the narrow one is drawn, the broad one is neither
# drawn beside it nor asked about.
BROADER: dict[str, tuple[str, ...]] = {
    "traffic light": ("green traffic light", "yellow traffic light", "red traffic light"),
    "stop sign": ("bus stop sign",),
    "bird": (
        "chicken", "chick", "duck", "swan", "owl", "eagle", "parrot", "peacock", "penguin", "flamingo",
        "toucan", "pigeon",
    ),
    "fish": ("shark", "whale", "dolphin"),
    "car": ("taxi", "police car", "race car", "ambulance", "truck"),
    "truck": ("fire truck", "ambulance", "tractor", "car"),
    "motorcycle": ("scooter",),
    "tree": ("pine tree", "palm tree", "christmas tree"),
    "flower": ("rose", "tulip", "sunflower", "potted plant"),
    "potted plant": ("cactus", "flower"),
    "clock": ("alarm clock", "watch"),
    "person": ("baby", "santa"),
    "bear": ("panda", "koala", "teddy bear"),
    "teddy bear": ("bear", "panda"),
    "dog": ("wolf", "fox"),
    "monkey": ("gorilla",),
    "hat": ("cap",),
    "shoe": ("boot", "high heel", "roller skate"),
    "cup": ("beer", "milk", "teapot"),
    "bowl": ("salad",),
    "bread": ("baguette", "sandwich"),
    "cake": ("cupcake", "pie"),
    "camera": ("video camera",),
    "book": ("notebook",),
    "envelope": ("mailbox",),
    "handbag": ("backpack", "briefcase"),
    "suitcase": ("briefcase",),
    "keyboard": ("laptop", "piano"),
    "tv": ("laptop",),
    "knife": ("plate", "sword"),
    "spoon": ("bowl",),
    "star": ("sun",),
    "house": ("castle", "church"),
    "mountain": ("volcano",),
    "door": ("house", "castle", "church"),
    "tie": ("t-shirt",),
    "t-shirt": ("tie",),
    "glove": ("boxing glove",),
    "candy": ("lollipop", "candy cane"),
    "pumpkin": ("santa",),
    "glasses": ("sunglasses",),
}  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.replace("\n", " ").split(","))


def sprite_sources() -> dict[str, tuple[list[str], list[str]]]:
    """{name: (emoji code points as lower-case hex, stamp paths)}, in the table's order.

    The variation selector U+FE0F is dropped: every set names its plain pictures without it.
    """
    sources: dict[str, tuple[list[str], list[str]]] = {}
    for line in _TABLE.strip().replace("\n    ", " ").splitlines():
        name, _, rest = line.partition(": ")
        tokens = rest.split()
        emoji = [f"{ord(t[0]):x}" for t in tokens if not t.isascii()]
        sources[name] = (emoji, [t for t in tokens if t.isascii()])
    return sources


def overlapping(name: str) -> frozenset[str]:
    """Names that a picture of `name` might also be called, or whose pictures might be called `name`."""
    narrow = BROADER.get(name, ())
    return frozenset(narrow) | {broad for broad, names in BROADER.items() if name in names}


# Everyday things that photographs show without anyone having labelled them.
UNLABELLED_IN_PHOTOS = _names("""
    alarm clock, anchor, baby, basket, bathtub, battery, beer, bell, bell pepper, boot, box, bread, broom,
    bucket, calendar, camera, candle, candy, cap, cheese, chocolate, chopsticks, church, cloud, cocktail, coin,
    cookie, corn, cucumber, cupcake, doll, door, dress, egg, envelope, eye, fire, flag, flower, fountain, french
    fries, game controller, garlic, gear, glasses, glove, grapes, hamburger, hand, hat, headphones, heart,
    helicopter, high heel, house, ice cream, jacket, kettle, key, ladder, leaf, lemon, lettuce, light bulb,
    lock, mailbox, microphone, milk, mountain, mushroom, newspaper, notebook, onion, palm tree, pancake, pants,
    pen, pencil, pie, pigeon, pine tree, plate, police car, potato, printer, radio, ribbon, ring, rose, salad,
    salt shaker, scarf, scooter, shoe, shopping cart, shorts, soap, sock, spaghetti, star, strawberry, sun,
    sunglasses, t-shirt, taco, taxi, teapot, telephone, tent, toilet paper, tomato, toothbrush, traffic cone,
    trash can, tree, trophy, watch
""")

# What a photo of one garment may also show.
CLOTHES = _names("""
    bed, book, boot, cap, cell phone, chair, couch, dress, handbag, hat, high heel, jacket, pants, person,
    potted plant, shoe, shorts, t-shirt, teddy bear, tie
""")

# What no photograph of playing cards, blood, road signs, receipts, clothes or raccoons shows by chance.
OUT_OF_PLACE = _names("""
    elephant, zebra, giraffe, lion, tiger, panda, koala, kangaroo, penguin, flamingo, shark, whale, dolphin, octopus,
    crab, lobster, crocodile, unicorn, dragon, dinosaur, rocket, ufo, violin, guitar, trumpet, saxophone, drum, pizza,
    donut, watermelon, pineapple, skis, snowboard, surfboard, robot, ghost, snowman, volcano, train, tractor, camel,
    kite, hot air balloon, igloo, castle, ferris wheel, microscope, telescope, peacock, gorilla, hippo, rhino
""")

# Other common words for a label; asked about now and then.
SYNONYMS = {
    "airplane": ("plane",),
    "bicycle": ("bike",),
    "cell phone": ("phone", "mobile phone"),
    "couch": ("sofa",),
    "donut": ("doughnut",),
    "game controller": ("controller",),
    "gift": ("present",),
    "hamburger": ("burger",),
    "laptop": ("computer",),
    "motorcycle": ("motorbike",),
    "mouse": ("computer mouse",),
    "potted plant": ("plant",),
    "rabbit": ("bunny",),
    "refrigerator": ("fridge",),
    "sports ball": ("ball",),
    "trash can": ("bin",),
    "tv": ("television",),
}

COCO_LABELS = _names("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush
""")

"""Paper documents with invented content: letters, invoices, forms and receipts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from molmo_edge.data.choices import pick, some, whole
from molmo_edge.data.drawn.colours import Colour
from molmo_edge.data.drawn.fonts import Face, Fonts, Lettering, Type
from molmo_edge.data.drawn.invented import company, date, goods, money, person, phone, street, town
from molmo_edge.data.drawn.sheets import Drawing, Pair, Sheet

_PAPERS: tuple[Colour, ...] = ((255, 255, 255), (253, 251, 245), (248, 248, 248), (255, 252, 235))
INK: Colour = (20, 20, 24)
MARGIN = 48
_MORE = (  # filler sentences that answer no question
    "If anything is unclear, please call us on any working day.", "We look forward to hearing from you soon.",
    "A copy of this letter went to our head office.", "Please keep this letter for your records.",
    "We thank you for your trust over the past years.", "Our doors are open from nine to five.",
    "Should you have moved house, let us know your new address.", "You need not answer this letter in writing.",
    "As always, parking is free behind the building.", "Our colleagues at the front desk are happy to help.",
)  # fmt: skip


def draw_document(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    """A letter, an invoice, a form or a receipt."""
    kinds: tuple[Callable[[np.random.Generator, Fonts], Drawing], ...] = (_letter, _invoice, _form, _receipt)
    return pick(rng, kinds)(rng, fonts)


class Page:
    """A sheet that is filled from top to bottom, and cropped after the text."""

    def __init__(self, rng: np.random.Generator, face: Face, width: int, size: float) -> None:
        self.sheet = Sheet(width, 2 * width + 400, pick(rng, _PAPERS))
        self.size, self.y, self.font = size, float(MARGIN), Lettering(face, size).font

    def say(self, text: str, scale: float = 1.0, bold: bool = False, align: str = "l", ink: Colour = INK) -> None:
        """Write a paragraph. `align`: "l", "m" or "r"."""
        font, width = self.font(scale, bold), self.sheet.width
        x = {"l": MARGIN, "m": width / 2, "r": width - MARGIN}[align]
        for line in self.sheet.wrap(text, font, width - 2 * MARGIN):
            self.sheet.text(x, self.y, line, font, ink, f"{align}a")
            self.y += font.line

    def skip(self, lines: float) -> None:
        """Move down by a number of lines, which may be a fraction."""
        self.y += self.size * 1.35 * lines

    def rule(self, ink: Colour = INK, width: float = 1) -> None:
        """Draw a horizontal line between the margins, `width` pixels thick."""
        self.sheet.line([(MARGIN, self.y), (self.sheet.width - MARGIN, self.y)], ink, width)

    def cells(self, edges: list[float], texts: list[str], bold: bool = False, left: int = 1) -> None:
        """Write a table row: the first `left` cells left-aligned, the others right-aligned."""
        for i, text in enumerate(texts):
            x = edges[i] + 6 if i < left else edges[i + 1] - 6
            self.sheet.text(x, self.y, text, self.font(bold=bold), INK, "la" if i < left else "ra")
        self.y += self.size * 1.6

    def finished(self, rng: np.random.Generator, asked: list[Pair], data: dict[str, Any]) -> Drawing:
        """Crop the sheet after the text and return it with the questions and the data."""
        self.sheet.image = self.sheet.image.crop((0, 0, self.sheet.width, round(self.y + MARGIN)))
        return self.sheet.drawing(rng, asked, data)


def new_page(rng: np.random.Generator, fonts: Fonts) -> Page:
    """Return an empty page 640 to 860 pixels wide, with a random font of 15 to 19 pixels."""
    return Page(rng, pick(rng, fonts.faces), whole(rng, 640, 860), float(rng.uniform(15, 19)))


# --- letters ------------------------------------------------------------------------------------------------------


def _letter(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    page, style = new_page(rng, fonts), whole(rng, 0, 3)
    sender, firm, reader, place = person(rng), company(rng), person(rng), town(rng)
    written, call, address = date(rng, style), phone(rng), street(rng)
    body, asked, subject = _matter(rng, style)
    align = pick(rng, ("l", "m"))
    page.say(firm, 1.5, bold=True, align=align)
    page.say(f"{address}, {place}", align=align)
    page.say(f"Telephone {call}", align=align)
    page.skip(1.5)
    page.say(written, align=pick(rng, ("l", "r")))
    page.skip(1)
    page.say(f"To {reader}")
    page.skip(1)
    page.say(f"Subject: {subject}", bold=True)
    page.skip(1)
    greeting = pick(rng, ("Dear", "Hello", "Good day"))
    page.say(f"{greeting} {reader},")
    for paragraph in body:
        page.skip(0.6)
        page.say(paragraph)
    page.skip(1)
    closing = pick(rng, ("Yours sincerely,", "Kind regards,", "With best wishes,", "Yours faithfully,"))
    page.say(closing)
    page.skip(1.5)
    role = pick(rng, ("Manager", "Director", "Secretary", "Head of Sales", "Customer Service", "Treasurer"))
    page.say(sender)
    page.say(role)
    asked += [
        (pick(rng, ("Who wrote this letter?", "Who signed the letter?", "Who is the letter from?")), sender),
        (pick(rng, ("Who is the letter addressed to?", "Who receives this letter?")), reader),
        (pick(rng, ("When was the letter written?", "What is the date of the letter?")), written),
        (pick(rng, ("What is the subject of the letter?", "What is the letter about?")), subject),
        ("Which company sent the letter?", firm),
        ("What is the telephone number of the company?", call),
        (f"What is the address of {firm}?", f"{address}, {place}"),
        (f"What is the position of {sender}?", role),
        ("How does the letter end, before the name?", closing),
        ("What kind of document is this?", "a letter"),
    ]
    return page.finished(rng, asked, {"kind": "letter", "subject": subject})


def _matter(rng: np.random.Generator, style: int) -> tuple[list[str], list[Pair], str]:
    """Paragraphs, questions about them, and the subject."""
    facts = (
        person(rng),
        str(whole(rng, 2, 60)),
        date(rng, style),
        money(whole(rng, 500, 90000)),
        _code(rng),
        town(rng),
    )
    host, amount, when, price, code, place = facts
    item = goods(rng, 1)[0]
    # Subject, text, and a question for each of the facts, in their order.
    matters: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        (
            f"Your order of the {item}",
            f"Thank you for your order {code} of {amount} pieces of the {item}. The goods leave our store on {when}. "
            f"The price is {price} including delivery to {place}. {host} looks after your order.",
            (
                "Who looks after the order?", "How many pieces were ordered?", "When do the goods leave the store?",
                "What is the price?", "What is the number of the order?", "Where are the goods delivered to?",
            ),
        ),
        (
            "Invitation to our meeting",
            f"We are glad to invite you to our yearly meeting in {place} on {when}. Your host will be {host}. A fee of "
            f"{price} covers lunch for up to {amount} guests. Please give the number {code} at the door.",
            (
                "Who is the host?", "For how many guests is lunch?", "When is the meeting?", "What is the fee?",
                "Which number must be given at the door?", "Where does the meeting take place?",
            ),
        ),
        (
            "A late payment",
            f"Our books show that bill {code} over {price} is still open. It was due {amount} days ago. Please pay by "
            f"{when}, or speak to {host} at our office in {place}.",
            (
                "Who can be spoken to?", "How many days ago was the bill due?", "By when shall the bill be paid?",
                "What is the amount of the open bill?", "Which bill is still open?", "Where is the office?",
            ),
        ),
        (
            f"The new {item}",
            f"From {when} on we offer the new {item} for {price}. Those who order {amount} or more pay nothing for "
            f"delivery; just name the code {code}. See it at our shop in {place}, where {host} answers all questions.",
            (
                "Who answers questions at the shop?", "How many must be ordered for free delivery?",
                "From when on is the article offered?", "What does the article cost?", "Which code shall be named?",
                "Where is the shop?",
            ),
        ),
        (
            "Repairs in your building",
            f"On {when} our team under {host} will come to {place} to repair the lift. The work takes {amount} hours. "
            f"Your share of the cost is {price}; please write {code} on your payment.",
            (
                "Who leads the team?", "How many hours does the work take?", "When does the team come?",
                "What is the reader's share of the cost?", "What shall be written on the payment?",
                "Where will the team come to?",
            ),
        ),
    )  # fmt: skip
    subject, text, questions = pick(rng, matters)
    more = some(rng, _MORE, whole(rng, 2, 6))
    half = len(more) // 2
    return [text, " ".join(more[:half]), " ".join(more[half:])], list(zip(questions, facts, strict=True)), subject


def _code(rng: np.random.Generator) -> str:
    letters = "".join(pick(rng, "ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(2))  # letters that do not look like digits
    return f"{letters}-{whole(rng, 1000, 99999)}"


# --- bills --------------------------------------------------------------------------------------------------------


def _bill(rng: np.random.Generator) -> list[tuple[str, int, int]]:
    """(article, pieces, price of one in cents)."""
    return [(name, whole(rng, 1, 12), 5 * whole(rng, 20, 4000)) for name in goods(rng, whole(rng, 2, 8))]


def _about_bill(rng: np.random.Generator, bill: list[tuple[str, int, int]]) -> list[Pair]:
    asked: list[Pair] = []
    for name, pieces, price in some(rng, bill, 4):
        asked.append((f"How many pieces of {name} were bought?", str(pieces)))
        asked.append((f"What is the price of one {name}?", money(price)))
        asked.append((f"What is the total amount for {name}?", money(pieces * price)))
    amounts = {name: pieces * price for name, pieces, price in bill}
    best = max(amounts, key=lambda name: amounts[name])
    if list(amounts.values()).count(amounts[best]) == 1:
        asked.append(("Which item has the highest amount?", best))
    asked.append(("How many different items are listed?", str(len(bill))))
    asked.append(("How many pieces were bought in all?", str(sum(pieces for _, pieces, _ in bill))))
    return asked


def _invoice(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    page, style, bill = new_page(rng, fonts), whole(rng, 0, 3), _bill(rng)
    seller, buyer, address, code = company(rng), person(rng), f"{street(rng)}, {town(rng)}", _code(rng)
    year, rate = whole(rng, 2010, 2029), pick(rng, (5, 7, 10, 19, 20))
    issued, due = date(rng, style, year, (1, 6)), date(rng, style, year, (7, 12))
    net = sum(pieces * price for _, pieces, price in bill)
    tax = (net * rate + 50) // 100
    accent = pick(rng, ((20, 20, 24), (20, 70, 140), (140, 30, 40), (20, 100, 70)))
    page.say(seller, 1.5, bold=True, ink=accent)
    page.say("INVOICE", 1.3, bold=True, align="r", ink=accent)
    for name, value in (("Invoice number", code), ("Date", issued), ("Due date", due)):
        page.say(f"{name}: {value}", align="r")
    page.say("Bill to", bold=True)
    page.say(buyer)
    page.say(address)
    page.skip(1)
    width = page.sheet.width - 2 * MARGIN
    edges = [MARGIN + width * share for share in (0, 0.46, 0.58, 0.79, 1.0)]
    page.rule(accent, 2)
    page.y += 6
    page.cells(edges, ["Description", "Qty", "Unit price", "Amount"], bold=True)
    page.rule(accent)
    page.y += 6
    for name, pieces, price in bill:
        page.cells(edges, [name, str(pieces), money(price), money(pieces * price)])
    page.rule(accent)
    page.y += 8
    for name, cents in (("Subtotal", net), (f"Tax ({rate}%)", tax), ("Total", net + tax)):
        page.cells([*edges[:2], edges[2], edges[4]], ["", "", f"{name}:  {money(cents)}"], bold=name == "Total")
    asked = [
        *_about_bill(rng, bill),
        ("What is the invoice number?", code),
        (pick(rng, ("What is the date of the invoice?", "When was the invoice issued?")), issued),
        (pick(rng, ("What is the due date?", "By when must the invoice be paid?")), due),
        (pick(rng, ("Who is the invoice for?", "Who has to pay the invoice?")), buyer),
        (pick(rng, ("Which company issued the invoice?", "Who sent the invoice?")), seller),
        ("What is the subtotal?", money(net)),
        ("What is the tax?", money(tax)),
        ("What is the tax rate?", f"{rate}%"),
        (pick(rng, ("What is the total?", "What is the total amount to pay?")), money(net + tax)),
        (f"What is the address of {buyer}?", address),
    ]
    return page.finished(rng, asked, {"kind": "invoice", "bill": bill, "tax": rate})


def _receipt(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    face = Face(*[pick(rng, fonts.mono)] * 2) if fonts.mono and rng.random() < 0.6 else pick(rng, fonts.faces)
    page, bill = Page(rng, face, whole(rng, 400, 480), float(rng.uniform(14, 16))), _bill(rng)
    shop, address, day = company(rng), street(rng), date(rng, 2)
    time, clerk = f"{whole(rng, 8, 20):02d}:{whole(rng, 0, 59):02d}", person(rng).split()[0]
    total = sum(pieces * price for _, pieces, price in bill)
    paid = -(-total // 1000) * 1000  # rounded up to ten dollars
    page.say(shop, 1.3, bold=True, align="m")
    page.say(address, align="m")
    page.say(f"{day}  {time}", align="m")
    page.skip(0.5)
    for name, pieces, price in bill:
        page.cells([MARGIN, 0, page.sheet.width - MARGIN], [name, money(pieces * price)])
        page.y -= page.size * 0.2
        page.say(f"  {pieces} x {money(price)}", 0.9)
    page.skip(0.3)
    page.rule()
    page.y += 6
    for line, cents in (("TOTAL", total), ("CASH", paid), ("CHANGE", paid - total)):
        page.cells([MARGIN, 0, page.sheet.width - MARGIN], [line, money(cents)], bold=line == "TOTAL")
    page.say(f"Served by {clerk}", align="m")
    page.say(pick(rng, ("Thank you!", "Please come again", "Goods may be returned within 14 days")), align="m")
    asked = [
        *_about_bill(rng, bill),
        (pick(rng, ("What is the name of the shop?", "Where was this bought?")), shop),
        (pick(rng, ("What is the total?", "How much was paid in total?")), money(total)),
        (pick(rng, ("How much change was given?", "What is the change?")), money(paid - total)),
        ("How much cash was given?", money(paid)),
        ("What is the date on the receipt?", day),
        ("At what time was the receipt printed?", time),
        ("Who served the customer?", clerk),
        ("What is the address of the shop?", address),
    ]
    return page.finished(rng, asked, {"kind": "receipt", "bill": bill, "paid": paid})


# --- forms --------------------------------------------------------------------------------------------------------


def _form(rng: np.random.Generator, fonts: Fonts) -> Drawing:
    page, style = new_page(rng, fonts), whole(rng, 0, 3)
    title = pick(rng, ("Membership Form", "Registration Form", "Booking Request", "Library Card Application"))
    filled = {
        "Name": person(rng), "Date of birth": date(rng, style), "Address": street(rng), "Town": town(rng),
        "Telephone": phone(rng), "Employer": company(rng), "Member number": _code(rng), "Contact person": person(rng),
        "Start date": date(rng, style), "Deposit": money(100 * whole(rng, 5, 400)),
    }  # fmt: skip
    fields = some(rng, list(filled), whole(rng, 5, 8))
    choices = some(rng, ("Morning", "Evening", "Weekend", "Swimming", "Library", "Parking", "Music", "Chess"), 5)
    ticked = [choice for choice in choices if rng.random() < 0.45] or choices[:1]
    page.say(title, 1.5, bold=True, align=pick(rng, ("l", "m")))
    page.skip(0.8)
    writer = pick(rng, fonts.faces).regular  # the handwriting
    ink = pick(rng, ((20, 40, 150), (30, 30, 30), (15, 15, 90)))
    label_width = max(page.sheet.measure(name, page.font()) for name in fields) + 24
    boxed = rng.random() < 0.5
    for name in fields:
        left, right = MARGIN + label_width, page.sheet.width - MARGIN
        page.sheet.text(MARGIN, page.y, name, page.font(), INK)
        if boxed:
            page.sheet.box((left, page.y - 5, right, page.y + page.size * 1.5), outline=(120, 120, 120))
        else:
            page.sheet.line([(left, page.y + page.size * 1.3), (right, page.y + page.size * 1.3)], (120, 120, 120))
        page.sheet.text(left + 8, page.y, filled[name], Type(writer, page.size), ink)
        page.skip(1.9)
    page.say("Please tick what applies", bold=True)
    for choice in choices:
        side, y = page.size, page.y + 3
        page.sheet.box((MARGIN, y, MARGIN + side, y + side), outline=INK, width=1.5)
        if choice in ticked:
            page.sheet.line([(MARGIN + 2, y + side / 2), (MARGIN + side / 2, y + side - 3)], ink, 2.5)
            page.sheet.line([(MARGIN + side / 2, y + side - 3), (MARGIN + side + 2, y - 2)], ink, 2.5)
        page.sheet.text(MARGIN + side + 10, page.y, choice, page.font(), INK)
        page.skip(1.3)
    asked: list[Pair] = [("What is the title of the form?", title), ("How many options are ticked?", str(len(ticked)))]
    asked += [(pick(rng, (f'What is written under "{n}"?', f"What is the {n.lower()}?")), filled[n]) for n in fields]
    asked += [(f'Is "{choice}" ticked?', "Yes" if choice in ticked else "No") for choice in some(rng, choices, 3)]
    asked.append(("Which options are ticked?", ", ".join(ticked)))
    return page.finished(rng, asked, {"kind": "form", "fields": {n: filled[n] for n in fields}, "ticked": ticked})

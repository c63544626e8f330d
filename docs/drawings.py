"""The drawings of the lessons: `python docs/drawings.py` writes nbs/drawings/NAME.svg, and NAME.ko.svg with Korean labels, which Sphinx takes.

A lesson has one as `![what it shows](drawings/NAME.svg)`. The site puts the SVG into the page, so that its colours are the page's; elsewhere
they are those after the commas below. All are narrow, with letters that can be read on a phone.
"""
import math
import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent/'nbs'/'drawings'
WIDTH = 400
# What a shape is: its ground and its line.
KINDS = dict(plain=('var(--drawing-plain, #eeeeee)', 'var(--drawing-line, #6b6b6b)'), new=('var(--drawing-new, #c8e6c9)', 'var(--drawing-new-line, #2e7d32)'),
             other=('var(--drawing-other, #d3e4f8)', 'var(--drawing-other-line, #1f5fa8)'), bad=('var(--drawing-bad, #fbdcd8)', 'var(--drawing-bad-line, #b3261e)'),
             none=('none', 'var(--drawing-line, #6b6b6b)'))
INK, GROUND = 'var(--drawing-ink, #222222)', 'var(--drawing-ground, #ffffff)'


class Drawing:
    "Shapes and labels. A label is a text, or a pair of texts: English and Korean."
    def __init__(self, height, language): self.height, self.language, self.parts = height, language, []

    def say(self, label): return label if isinstance(label, str) else label[self.language == 'ko']

    def text(self, x, y, label, size=14, anchor='middle', bold=False, mono=False):
        lines, step = self.say(label).split('\n'), size * 1.25
        look = f'font-family="{"monospace" if mono else "sans-serif"}" font-weight="{"bold" if bold else "normal"}"'
        for number, line in enumerate(lines):
            at = y + (number - (len(lines) - 1) / 2) * step + size * .35
            self.parts.append(f'<text x="{x:g}" y="{at:g}" font-size="{size}" text-anchor="{anchor}" fill="{INK}" {look}>{escape(line)}</text>')

    def box(self, x, y, width, height, label='', kind='plain', size=14, mono=False, bold=False):
        ground, line = KINDS[kind]
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{ground}" stroke="{line}"/>')
        if label: self.text(x + width / 2, y + height / 2, label, size, mono=mono, bold=bold)

    def line(self, *points, kind='plain', dashed=False, arrow=False):
        path = 'M' + ' L'.join(f'{x:g} {y:g}' for x, y in points)
        colour = KINDS[kind][1]
        self.parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{"4 3" if dashed else "none"}"/>')
        if not arrow: return
        (x0, y0), (x, y) = points[-2:]
        turn = math.degrees(math.atan2(y - y0, x - x0))
        self.parts.append(f'<path d="M0 0 L-8 -4 L-8 4 Z" fill="{colour}" transform="translate({x:g} {y:g}) rotate({turn:.0f})"/>')

    def arrow(self, *points, **look): self.line(*points, arrow=True, **look)

    def svg(self):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}">\n'
                f'<rect width="{WIDTH}" height="{self.height}" fill="{GROUND}"/>\n' + '\n'.join(self.parts) + '\n</svg>\n')


def pipeline(language):
    "From rows to an answer: what each page makes of what the page before it left."
    d = Drawing(176, language)
    stages = [('00', ('data', '데이터'), 'train.jsonl\nvalid.jsonl'), ('01', ('training', '학습'), 'adapter/'), ('02', ('merging', '병합'), 'merged/'),
              ('03', 'Ollama', 'model.gguf\nModelfile'), ('04', ('evaluation', '평가'), 'report')]
    for i, (number, name, made) in enumerate(stages):
        x = 4 + 80 * i
        d.box(x, 40, 68, 44, f'{number}\n{d.say(name)}', kind='new', size=10.5, bold=True)
        d.text(x + 34, 118, made, size=11.5, mono=True)
        d.line((x + 34, 84), (x + 34, 100), dashed=True)
        if i < 4: d.arrow((x + 68, 62), (x + 79, 62))
    d.text(38, 16, ('rows', '행'), size=13)
    d.arrow((38, 25), (38, 39))
    d.text(WIDTH / 2, 158, ('one folder: runs/NAME', '폴더 하나: runs/이름'), size=13)
    d.line((4, 140), (396, 140))
    return d


def loss_mask(language):
    "A row as tokens: the question has the label -100, the answer and its terminator have themselves."
    d = Drawing(190, language)
    x, y = 6, 34
    for tokens in (('<bos>', '###', 'Instruction', ':', '\\n'), ('은/는', ':', '도로', '\\n\\n', '###', 'Response', ':', '\\n')):
        for token in tokens:
            width = 12 + sum(13 if '가' <= c <= '힣' else 8 for c in token)
            d.box(x, y, width, 26, token, size=13, mono=True)
            x += width + 4
        x, y = 6, y + 34
    for token, width in (('도로', 44), ('는', 30), ('<eos>', 58)):
        d.box(x, y, width, 26, token, 'new', size=13, mono=True)
        x += width + 4
    d.text(6, 16, ('only read: label -100', '읽기만 함: 레이블 -100'), anchor='start')
    d.text(x + 8, y + 13, ('in the loss: label = token', '손실에 들어감: 레이블 = 토큰'), anchor='start', bold=True)
    d.text(6, 158, ('The model learns to write the answer and to stop.\nThe question is only context.',
                    '모델은 답변을 쓰고 멈추는 법을 배웁니다.\n질문은 읽기만 합니다.'), size=13, anchor='start')
    return d


def lora(language):
    "A frozen matrix, and beside it the product of two thin ones, which alone are trained."
    d = Drawing(268, language)
    d.box(10, 60, 150, 110, ('W, frozen\n640 × 2,048\n= 1,310,720', 'W, 고정\n640 × 2,048\n= 1,310,720'), size=13)
    d.box(250, 142, 120, 28, 'A: r × 640', 'new', size=13, bold=True)
    d.box(270, 66, 80, 44, 'B:\n2,048 × r', 'new', size=13, bold=True)
    d.text(200, 236, 'x', bold=True)
    d.arrow((200, 226), (200, 204), (85, 204), (85, 172))
    d.arrow((200, 204), (310, 204), (310, 172), kind='new')
    d.arrow((310, 142), (310, 112), kind='new')
    d.parts.append(f'<circle cx="200" cy="30" r="12" fill="none" stroke="{KINDS["plain"][1]}" stroke-width="1.5"/>')
    d.text(200, 30, '+', size=16)
    d.arrow((85, 60), (85, 30), (187, 30))
    d.arrow((310, 66), (310, 30), (213, 30), kind='new')
    d.text(262, 20, '× α / r', size=13)
    d.text(WIDTH / 2, 254, ('r = 8: 8 × (640 + 2,048) = 21,504 numbers to train', 'r = 8: 학습하는 수 8 × (640 + 2,048) = 21,504개'), size=13)
    return d


def packing(language):
    "Three rows in one sequence: each token sees the tokens before it in its own row, and no other."
    d, rows, size, left, top = Drawing(330, language), (4, 3, 2), 26, 92, 62
    starts = [sum(rows[:i]) for i in range(len(rows))]
    owner = [row for row, length in enumerate(rows) for _ in range(length)]
    for i in range(9):
        for j in range(9):
            kind = 'none' if j > i else ('new', 'other', 'new')[owner[i]] if owner[i] == owner[j] else 'none'
            d.box(left + size * j, top + size * i, size, size, '·' if kind == 'none' and j < i else '', kind)
        d.text(left + size * (i + .5), top - 12, str(i - starts[owner[i]]), size=13, mono=True)
    for row, (start, length) in enumerate(zip(starts, rows)):
        d.text(left - 8, top + size * (start + length / 2), (f'row {row + 1}', f'행 {row + 1}'), anchor='end', bold=True)
    d.text(left + size * 4.5, 22, ('position ids begin again with each row', '행마다 위치 번호가 다시 0부터'), size=13)
    d.text(WIDTH / 2, 316, ('coloured: seen · dot: hidden, although it comes before', '색칠한 칸: 보임 · 점: 앞에 있지만 가려짐'), size=13)
    return d


def two_sides(language):
    "One question goes through the training's code and through Ollama, and the same tokens must come out."
    d = Drawing(284, language)
    d.text(96, 14, ('training (transformers)', '학습(transformers)'), bold=True)
    d.text(304, 14, ('serving (Ollama)', '서빙(Ollama)'), bold=True)
    steps = [(('a row:\ninstruction, input', '행:\ninstruction, input'), ('a request:\nprompt, system', '요청:\nprompt, system'), ''),
             ('format_prompt', 'TEMPLATE', ('same text?', '텍스트가 같은가?')), ('tokenizer.json', ('vocabulary\nin the GGUF', 'GGUF 안의\n어휘 집합'), ('same ids?', 'id가 같은가?')),
             (('weights,\nsafetensors', '가중치,\nsafetensors'), ('weights\nin the GGUF', 'GGUF 안의\n가중치'), ('same answer?', '답이 같은가?'))]
    for i, (one, other, check) in enumerate(steps):
        y = 28 + 62 * i
        d.box(16, y, 132, 42, one, 'plain', size=13)
        d.box(252, y, 132, 42, other, 'other', size=13)
        if i < 3:
            d.arrow((82, y + 42), (82, y + 61))
            d.arrow((318, y + 42), (318, y + 61))
        if check:
            d.text(200, y + 9, check, size=12)
            d.line((150, y + 24), (250, y + 24), kind='new', dashed=True)
    d.text(200, 271, ('<bos> is added by both: it is in neither prompt', '<bos>는 양쪽이 알아서 붙이므로 프롬프트에 쓰지 않음'), size=13)
    return d


def stopping(language):
    "Three things end an answer: the model's own terminator, a stop string, a limit."
    d = Drawing(204, language)
    rows = [(('the model writes <eos>: a finished answer', '모델이 <eos>를 씀: 끝맺은 답변'), ['1', ',', '3', ',', '8', '<eos>'], 'new', ('stop', '끝')),
            (('no <eos>: a stop string cuts', '<eos>가 없음: 정지 문자열이 자름'), ['1', ',', '3', ',', '8', '### Input:'], 'other', ('cut', '자름')),
            (('neither: num_predict cuts', '둘 다 없음: num_predict가 자름'), ['1', ',', '3', ',', '8', '8', '8', '8', '8'], 'bad', ('cut', '자름'))]
    for i, (label, tokens, kind, end) in enumerate(rows):
        y, x = 14 + 66 * i, 8
        d.text(8, y, label, anchor='start', bold=True)
        for place, token in enumerate(tokens):
            width = 14 + 9 * len(token)
            last = place == len(tokens) - 1
            d.box(x, y + 18, width, 28, token, kind if last or kind == 'bad' and place > 4 else 'plain', mono=True)
            x += width + 4
        d.line((x + 2, y + 14), (x + 2, y + 50), kind=kind)
        d.text(x + 10, y + 32, end, size=13, anchor='start')
    return d


DRAWINGS = dict(pipeline=pipeline, loss_mask=loss_mask, lora=lora, packing=packing, two_sides=two_sides, stopping=stopping)


def write(folder=FOLDER):
    "Write every drawing in both languages."
    folder.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        for language, end in (('en', ''), ('ko', '.ko')): (folder/f'{name}{end}.svg').write_text(draw(language).svg(), encoding='utf-8', newline='\n')


if __name__ == '__main__': write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

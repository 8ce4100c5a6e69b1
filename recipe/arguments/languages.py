"""Languages that text may be in, by their codes, and which of them the sentence splitter has rules for."""

import re

from recipe.base.errors import UserError, did_you_mean


def words(text: str) -> list[str]:
    """Return the words of a text, which take less room in it than in a list."""
    return text.split()


# The codes of ISO 639-1. Those of three letters, of ISO 639-3, are too many to list.
CODES = words("""
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
    es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
    ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
    no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta
    te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu""")
# Those that sentencex 1.0.32 has rules of their own for.
WITH_RULES = words("am ar bg bn ca da de el en es fi fr gu hi hy it ja kk kn ml mr my nl pa pl pt ru sk ta te uk")
NAMES = dict(
    pair.split("=")
    for pair in words("""
    amharic=am arabic=ar armenian=hy bengali=bn bulgarian=bg burmese=my catalan=ca chinese=zh croatian=hr czech=cs
    danish=da deutsch=de dutch=nl english=en español=es estonian=et finnish=fi français=fr french=fr german=de greek=el
    hebrew=he hindi=hi hungarian=hu indonesian=id italian=it japanese=ja kazakh=kk korean=ko latin=la latvian=lv
    lithuanian=lt malay=ms mandarin=zh norwegian=no persian=fa polish=pl portuguese=pt romanian=ro russian=ru serbian=sr
    slovak=sk slovenian=sl spanish=es swahili=sw swedish=sv tamil=ta telugu=te thai=th turkish=tr ukrainian=uk urdu=ur
    vietnamese=vi""")
)


# Codes of ISO 639-2 and 639-3 of languages that have one of two letters, by which sentencex knows their rules.
THREE_LETTERS = dict(
    pair.split("=")
    for pair in words("""
    amh=am ara=ar arm=hy ben=bn bul=bg bur=my cat=ca ces=cs chi=zh cze=cs dan=da deu=de dut=nl ell=el eng=en fas=fa
    fin=fi fra=fr fre=fr ger=de gre=el guj=gu heb=he hin=hi hrv=hr hun=hu hye=hy ind=id ita=it jpn=ja kan=kn kaz=kk
    kor=ko lat=la lit=lt mal=ml mar=mr mya=my nld=nl nor=no pan=pa per=fa pol=pl por=pt ron=ro rum=ro rus=ru slk=sk
    slo=sk slv=sl spa=es srp=sr swe=sv tam=ta tel=te tha=th tur=tr ukr=uk urd=ur vie=vi zho=zh""")
)


def check_language(language: str) -> None:
    """Raise a `UserError`, with the nearest code, unless a language is given by its code of ISO 639-1.

    The code of ISO 639-3 is that of a language which has none of two letters.
    """
    if language in CODES or (re.fullmatch("[a-z]{3}", language) and language not in THREE_LETTERS):
        return
    name = language.lower()
    code = re.split("[-_]", name)[0]  # of `de-AT`
    hint = f"; did you mean `{code}`?" if code in CODES else did_you_mean(name, NAMES)
    hint = f"; did you mean `{THREE_LETTERS[language]}`?" if language in THREE_LETTERS else hint
    hint = re.sub("`(.*)`", lambda near: f"`{NAMES.get(near[1], near[1])}`", hint)
    hint = hint or f"; sentencex has rules for {', '.join(WITH_RULES)}, and finds sentences in others too"
    raise UserError(f"`language` is {language!r:.50}, which is no code of ISO 639-1 such as en, de or zh{hint}")


def describe_rules(language: str) -> str:
    """Say that the splitter has no rules of its own for a language; an empty string if it has."""
    if language in WITH_RULES:
        return ""
    rules = "those of a related language, or of English, which know the sentence marks of all scripts"
    return f"sentencex has no rules of its own for `language` {language} and takes {rules}"

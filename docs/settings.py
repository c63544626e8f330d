"settings.ini as the site reads it: names, version, addresses."
from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
settings = dict(ini['DEFAULT'])
site = settings['doc_host'] + settings['doc_baseurl'] + '/'   # where the published site stands

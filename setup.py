"Packaging: every fact comes from settings.ini, which nbdev reads too"
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'): shlex.split(v) for k,v in cfg.items() if k.endswith('_requirements')}
versions = [f"3.{minor}" for minor in range(int(cfg['min_python'].split('.')[1]), int(cfg['max_python'].split('.')[1])+1)]
# a page of the registry has no files beside it
page,address = (here/'README.md').read_text(encoding='utf-8'), f"{cfg['git_url']}/{{}}/{cfg['branch']}/"
page = re.sub(r'(!\[[^]]*\]\()(?!https?:|#)', rf"\1{address.format('raw')}", page)
page = re.sub(r'((?<!!)\[[^]]*\]\()(?!https?:|#)', rf"\1{address.format('blob')}", page)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'],
    long_description=page, long_description_content_type='text/markdown',
    packages=find_packages(include=['vadnb*']), package_data={'vadnb': ['configs/*.yaml', 'systems/*/logs/*/*']},
    python_requires=f">={cfg['min_python']}", install_requires=shlex.split(cfg['requirements']),
    extras_require=extras, classifiers=[*cfg['classifiers'].strip().splitlines(),
                                        *(f'Programming Language :: Python :: {v}' for v in ('3', *versions))],
    project_urls=dict(Source=cfg['git_url'], Changes=f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
                      Documentation=f"{cfg['doc_host']}{cfg['doc_baseurl']}"),
    entry_points={'console_scripts': shlex.split(cfg['console_scripts'])},
)

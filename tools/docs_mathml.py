"Formulas of the site as MathML, which browsers draw themselves: no script, no fonts, nothing to fetch"
import re
from docutils import nodes
from latex2mathml.converter import convert

def formula(latex, display): return convert(latex.strip(), display=display)

def visit_inline(self, node):
    self.body.append(formula(node.astext(), 'inline'))
    raise nodes.SkipNode

def visit_block(self, node):
    self.body.append(self.starttag(node, 'div', CLASS='math'))
    if node['number']:
        self.body.append(f"<span class=\"eqno\">({node['number']})")
        self.add_permalink_ref(node, 'Link to this equation')
        self.body.append('</span>')
    latex = re.sub(r'\\label\{[^}]*\}', '', node.astext())
    self.body.append(formula(latex, 'block')+'</div>')
    raise nodes.SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', (visit_inline, None), (visit_block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)

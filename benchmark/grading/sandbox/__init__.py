"""The inside of the grader: what runs in the two processes of one grading. `benchmark/grading/grader.py`
starts it; nothing here is an interface.

1. A *template* process (`template`) is started clean (a new interpreter, no environment, no tests, no
   threads), warms up its imports, shuts itself into whatever the kernel grants (`isolation`), and from then
   on only forks: one child per grading.
2. The `program` template's child (`program`) holds the program and never hears of the tests. The `judge`
   template's child (`judge`) holds the tests and runs them; what the program defines is present there only as
   proxies. They are two processes, so that neither memory holds the other's secret.
3. Plain data crosses (`link`): JSON with a tag for each exact builtin type, checked on arrival, no pickle. A
   program that forges messages can say nothing that it could not have said by returning a value. Objects that
   are not plain data stay where they are and cross as numbers.
4. Comparison happens in the judge on plain data. A program's object is never asked whether it equals
   something that belongs to the tests.

Standard library only, and imports within this folder are relative: a template starts in an interpreter that
sees this folder and nothing else of the project.
"""

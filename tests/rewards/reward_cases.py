r"""Rows of (completion, gold answer, verdict), by verifier and form of the answer.

`test_reward_cases.py` checks them. The rows marked by a comment were wrong in an earlier version.
"""

OK = "ok"
WRONG = "wrong"
UNPARSABLE = "unparsable"

# The default form: the last box, or all that follows the thinking.
MATH = [
    # ------------------------------------------------ exact values and decimals
    (r"\boxed{42}", "42", OK),
    ("\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", "42", OK),
    ("42", "42", OK),
    ("The answer is 42.", "42", OK),
    ("43", "42", WRONG),
    (r"\frac{1}{2}", "0.5", OK),
    (".5", r"\frac{1}{2}", OK),
    ("1/2", "2", WRONG),
    ("0.333333", r"\frac{1}{3}", OK),
    ("0.33", r"\frac{1}{3}", WRONG),
    (r"0.\overline{3}", r"\frac{1}{3}", OK),  # 0.\overline{3} was read as 0
    (r"\frac{1}{3}", r"0.\overline{3}", OK),
    (r"0.1\overline{6}", r"\frac16", OK),
    (r"0.\bar{9}", "1", OK),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", WRONG),  # rounding made all small numbers equal
    (r"\frac{1}{2006!}", r"\frac{1}{2006!}", OK),
    (r"\frac{1}{2006 \cdot 2005!}", r"\frac{1}{2006!}", OK),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", WRONG),
    (r"2^{-99}", r"\frac{1}{2^{99}}", OK),
    (r"6.6 \times 10^{-34}", r"1.6 \times 10^{-19}", WRONG),
    (r"6.6 \times 10^{-34}", "6.6e-34", OK),
    ("0.0000001", "0.0000002", WRONG),
    ("0.0000001", "1e-7", OK),
    ("3e8", "300000000", OK),  # was 3*e*8
    ("300000000", r"3 \times 10^8", OK),
    ("1.5e-7", "0.00000015", OK),
    ("1.5E-7", "0.00000016", WRONG),
    ("1e5", "100000", OK),
    (r"1\,234", "1234", OK),
    ("1 000", "1000", OK),
    ("1,234", "1234", OK),
    (r"10,\!000", "10000", OK),
    (r"1{,}234", "1234", OK),
    (r"1\,234", "234", WRONG),
    ("1234567.1", "1234567.2", WRONG),
    ("12345678", "12345679.0", WRONG),
    ("12345678901234567890", "12345678901234567891", WRONG),
    ("0.1", r"\frac{1}{10}", OK),
    ("3.141593", r"\pi", OK),
    ("3.14", r"\pi", WRONG),
    ("1.41421356", r"\sqrt{2}", OK),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{e}", WRONG),  # \mathrm{e} ended the reading
    (r"1 - 1/\mathrm{e}", r"1 - \frac{1}{e}", OK),
    ("1+1/e", r"1 + \frac{1}{\mathrm{e}}", OK),
    (r"2\frac{1}{2}", "2.5", OK),
    ("2 1/2", r"\frac{5}{2}", OK),
    ("-5", "5", WRONG),
    ("\N{EN DASH}5", "-5", OK),
    ("\N{MINUS SIGN}5", "-5", OK),
    ("101_2", "5", OK),
    ("101_2", "101", WRONG),
    ("5", "101_2", OK),
    (r"\text{FF}", "255", WRONG),
    # ------------------------------------------------ plain mathematics
    ("pi/2", r"\frac{\pi}{2}", OK),
    ("sqrt(2)", r"\sqrt{2}", OK),
    ("√2", r"\sqrt{2}", OK),
    ("√(x+1)", r"\sqrt{x+1}", OK),
    ("exp(16)-1", "e^{16}-1", OK),
    ("x**2", "x^2", OK),
    ("2*sqrt(3)/3", r"\frac{2}{\sqrt{3}}", OK),
    ("sqrt(2)", r"\sqrt{3}", WRONG),
    ("2π", r"2\pi", OK),
    ("x^2 + 2x + 1", "(x+1)^2", OK),
    ("x^2 + 2x + 2", "(x+1)^2", WRONG),
    (r"\sqrt{8}", r"2\sqrt{2}", OK),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", OK),
    (r"\sin(x)^2 + \cos(x)^2", "1", OK),
    (r"\log_2 8", "3", OK),
    (r"\binom{5}{2}", "10", OK),
    ("5!", "120", OK),
    ("2^{10}", "1024", OK),
    ("2^{10}", "10", WRONG),
    (r"2^{1000}", r"2^{1001}", WRONG),
    (r"4^{500}", r"2^{1000}", OK),
    ("3+4i", "4i+3", OK),
    # ------------------------------------------------ sets, intervals, tuples, sequences
    (r"\{2, 1\}", r"\{1,2\}", OK),
    (r"\{1, 3\}", r"\{1,2\}", WRONG),
    ("1, 2", "2, 1", OK),
    ("(1, 2)", "(1,2)", OK),
    ("(2, 1)", "(1,2)", WRONG),
    ("[0, 1)", "[0,1)", OK),
    ("[0, 1]", "[0,1)", WRONG),
    (r"(-\infty, 0)", r"(-\infty,0)", OK),
    (r"\{0.0000001, 1\}", r"\{0.0000002, 1\}", WRONG),
    (r"1, 2, \ldots, n", r"1, 2, \ldots, n", OK),
    (r"1, 2, \dots, n", r"1, 2, \ldots, n", OK),
    (r"1, 3, 5, \ldots, 2n-1", r"1, 2, \ldots, n", WRONG),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", OK),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", WRONG),
    # ------------------------------------------------ equations
    ("x = 5", "5", OK),
    ("x = 6", "5", WRONG),
    ("12 + 7 = 19", "19", OK),
    ("12 + 7 = 18", "19", WRONG),
    ("so we get 12 + 7 = 19", "19", OK),
    ("8 = 7", "7", WRONG),  # math-verify takes the last side
    ("x = 8 = 7", "7", WRONG),
    ("7 = 7", "7", OK),
    (r"\frac{14}{2} = 7", "7", OK),
    ("1/3 = 0.33", "0.33", OK),  # rounding is no contradiction
    ("y = 2x + 1", "y = 1 + 2x", OK),
    # ------------------------------------------------ units
    ("5 km", "5 m", WRONG),  # math-verify leaves all units out
    ("5 km", "5000 m", OK),
    ("5 km", "5 km", OK),
    ("5", "5 km", OK),
    (r"5\text{ km}", "5", OK),
    (r"5\text{ cm}", r"5\,\mathrm{cm}", OK),
    (r"5\text{ kg}", r"5\text{ km}", WRONG),
    (r"25\text{ cm}^2", "25", OK),
    (r"25\text{ cm}^2", r"25\text{ cm}", WRONG),
    (r"\$5", "5", OK),
    (r"\$5", "5 dollars", OK),
    ("90 minutes", "1.5 hours", OK),
    ("6 apples", "5 apples", WRONG),
    ("50 %", "0.5", OK),
    (r"50\%", "50", OK),
    (r"50\%", r"\frac{1}{2}", OK),
    ("0.5", "50", WRONG),
    ("0.5", r"50\%", OK),
    ("50", r"50\%", OK),
    (r"5\%", r"50\%", WRONG),
    (r"50\%", r"$50\%$", OK),
    # ------------------------------------------------ words
    ("Yes", "Yes", OK),
    ("yes", r"\text{Yes}", OK),
    (r"\boxed{\text{Yes}}", "yes", OK),
    ("No", "Yes", WRONG),
    ("Tuesday", "Tuesday", OK),
    ("The answer is Tuesday.", "Tuesday", OK),
    ("Monday", "Tuesday", WRONG),
    (r"\text{ABC}", "ABC", OK),
    ("ACB", "ABC", WRONG),
    ("(B)", "B", OK),
    (r"\textbf{(C)}", "B", WRONG),
    ("42", "Yes", WRONG),
    (r"\text{infinitely many}", "infinitely many", OK),
    # ------------------------------------------------ where the answer stands
    (r"first \boxed{4}, no: \boxed{3}", "3", OK),  # was wrong: all of it was the answer
    (r"first \boxed{3}, no: \boxed{4}", "3", WRONG),
    (r"<think>\boxed{3}</think> \boxed{4}", "4", OK),
    (r"<think>it must be \boxed{4}", "4", UNPARSABLE),  # thoughts that never end are no answer
    ("<think>4</think> 4", "4", OK),
    ("word " * 5000 + r"\boxed{42}", "42", OK),  # 25 000 characters: the limit is on the answer
    ("word " * 5000, "42", UNPARSABLE),
    (r"\[ \boxed{\frac{1}{2}} \]", "0.5", OK),
    (r"The final answer is $\boxed{\frac{1}{2}}$.", "0.5", OK),
    (r"\boxed{x \in \{1, 2\}}", r"\{1, 2\}", OK),
    # ------------------------------------------------ nothing to grade, and too much
    ("I do not know", "42", UNPARSABLE),
    (r"$\frac{1}{$", "42", UNPARSABLE),
    ("", "42", UNPARSABLE),
    ("\x00", "42", UNPARSABLE),
    ("9^{9^{9}}", "5", UNPARSABLE),
    ("9**9**9", "5", UNPARSABLE),
    ("(x+1)^{5000}", "5", UNPARSABLE),
    (r"\prod_{n=1}^{10^6} n", "5", UNPARSABLE),
    (r"\sum_{n=1}^{1000000} n", "5", UNPARSABLE),
    ("+".join(["1"] * 500), "500", UNPARSABLE),
    ("(" * 400 + "1" + ")" * 400, "1", UNPARSABLE),
    ("100000!", "5", UNPARSABLE),
    ("((7!)!)!", "5", UNPARSABLE),
    (r"\binom{1000000}{500000}", "5", UNPARSABLE),
    ("9^{9^{9}}", "9^{9^{9}}", OK),  # the same text needs no computing
]

LAST_NUMBER = [
    ("3 + 4 = 7.", "7", OK),
    ("it is .5", "0.5", OK),  # was 5
    ("it is .5", "5", WRONG),
    ("it is 1/2", "1/2", OK),
    ("it is 1/2", "2", WRONG),  # was right
    ("it is 1.5e3", "1500", OK),  # was 3
    ("it is 6.02e23", "6.02e23", OK),  # was 23
    ("it is 6.02e23", "23", WRONG),
    (r"it is 6.02 \times 10^{23}", "6.02e23", OK),
    ("it is 10^{-3}", "0.001", OK),  # was -3
    ("it is 10^6", "1000000", OK),  # was 6
    ("it is 10^6", "6", WRONG),
    ("10 -3", "3", OK),  # a subtraction, as in 54-93
    ("it is -3", "-3", OK),
    ("it is 1 000", "1000", OK),  # was 000
    ("it is 1,234,567.50 dollars", "1234567.5", OK),
    ("it is 2 1/2", "2.5", OK),  # was 2
    (r"it is 2\frac{1}{2}", "2.5", OK),
    ("it is -$5", "-5", OK),  # was 5
    (r"it is -\$5.00", "-5", OK),
    ("it is \N{EN DASH}5", "-5", OK),  # was 5
    ("pages 3\N{EN DASH}5", "5", OK),
    ("54 - 93 = -39", "-39", OK),
    (r"so $\frac{3}{4}$", "0.75", OK),
    (r"so $-\frac{3}{4}$", "-0.75", OK),
    (r"0.\overline{3}", "1/3", OK),
    ("it is 2^10", "1024", OK),
    ("it is 2^10", "10", WRONG),
    ("50%", "50", OK),
    ("no number", "5", UNPARSABLE),
]

NUMERIC = [
    ("\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}", "42", UNPARSABLE),
    ("3/4", "0.75", OK),
    ("2 1/2", "2.5", OK),
    ("1 000", "1000", OK),
    (r"\frac{3}{4}", "0.75", OK),
    ("10^-3", "0.001", OK),
    ("0.33333333333333333333", "1/3", WRONG),
    ("5 apples", "5", UNPARSABLE),
    ("1/0", "5", UNPARSABLE),
    ("9" * 10_000, "5", UNPARSABLE),
    ("1e999999999", "5", UNPARSABLE),
]

# Thoughts and answers in tags, as decoding gives them also where they are special tokens.
TAGGED = [
    ("<answer>42</answer>", "42", OK),
    ("<think>41</think><answer>42</answer>", "42", OK),
    ("<think><answer>41</answer></think><answer>42</answer>", "42", OK),
    ("<think><answer>42</answer></think><answer>41</answer>", "42", WRONG),
    (r"<answer>\boxed{42}</answer>", "42", OK),
    (r"<answer>$\frac{84}{2}$</answer>", "42", OK),
    ("<answer>\n42\n</answer><|im_end|>", "42", OK),
    ("<answer>42", "42", UNPARSABLE),
    ("42</answer>", "42", UNPARSABLE),
    ("<think>42</think>42", "42", UNPARSABLE),
    ("<answer></answer>", "42", UNPARSABLE),
]

FINAL = [
    ("<think>41</think>42", "42", OK),
    ("<think>42</think>41", "42", WRONG),
    (r"<think>\boxed{41}</think>\boxed{42}", "42", OK),
    (r"<think>\boxed{42}</think>no", "42", UNPARSABLE),
    ("<think>42", "42", UNPARSABLE),
    ("<think>1</think><think>2</think>42", "42", OK),
    ("</think>42", "42", OK),
    ("42", "42", OK),
]

# (verifier, form, rows)
TABLES = [
    ("math", "auto", MATH),
    ("numeric", "last_number", LAST_NUMBER),
    ("numeric", "auto", NUMERIC),
    ("math", "answer_tag", TAGGED),
    ("math", "final", FINAL),
]

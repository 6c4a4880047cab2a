//! Tokens into a tree. Operators of one precedence form a list, so that a long chain of them does not nest.

use std::rc::Rc;

use super::PacError;
use super::lexer::{Placed, Token, tokens};

/// Deepest nesting of statements and expressions; it bounds the stack here and when the tree is dropped.
const MAX_NESTING: u32 = 100;

#[derive(Debug)]
pub(super) struct Function {
    pub(super) name: Option<String>,
    pub(super) parameters: Vec<String>,
    pub(super) body: Vec<Statement>,
    pub(super) line: u32,
}

#[derive(Debug)]
pub(super) enum Statement {
    Expression(Expression),
    Variables(Vec<(String, Option<Expression>)>),
    Function(Rc<Function>),
    Return(Option<Expression>),
    If(Expression, Box<Statement>, Option<Box<Statement>>),
    /// Start, condition, step, body.
    For(Option<Box<Statement>>, Option<Expression>, Option<Expression>, Box<Statement>),
    /// Variable, what is walked over, body.
    ForIn(String, Expression, Box<Statement>),
    While(Expression, Box<Statement>),
    DoWhile(Box<Statement>, Expression),
    Switch(Expression, Vec<(Option<Expression>, Vec<Statement>)>),
    Try(Vec<Statement>, Option<(String, Vec<Statement>)>, Vec<Statement>),
    Throw(Expression),
    Block(Vec<Statement>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(super) struct Expression {
    pub(super) kind: Kind,
    pub(super) line: u32,
}

#[derive(Debug)]
pub(super) enum Kind {
    Number(f64),
    Text(Rc<str>),
    Boolean(bool),
    Null,
    Undefined,
    Name(String),
    Regex(String, String),
    List(Vec<Expression>),
    Object(Vec<(String, Expression)>),
    Function(Rc<Function>),
    /// Operands of one precedence, from the left.
    Chain(Box<Expression>, Vec<(&'static str, Expression)>),
    /// All of them joined by `&&` or `||`.
    And(Vec<Expression>),
    Or(Vec<Expression>),
    Unary(&'static str, Box<Expression>),
    TypeOf(Box<Expression>),
    /// Change by one, and whether the old value counts.
    Step(f64, bool, Box<Expression>),
    Conditional(Box<Expression>, Box<Expression>, Box<Expression>),
    /// Operator (`=` is empty), target, value.
    Assign(&'static str, Box<Expression>, Box<Expression>),
    Member(Box<Expression>, Box<Expression>),
    Call(Box<Expression>, Vec<Expression>),
    New(Box<Expression>, Vec<Expression>),
    /// Values separated by commas.
    Sequence(Vec<Expression>),
}

pub(super) fn parse(script: &str) -> Result<Vec<Statement>, PacError> {
    let mut parser = Parser { tokens: tokens(script)?, at: 0, nesting: 0 };
    let mut statements = Vec::new();
    while parser.peek() != &Token::End {
        statements.push(parser.statement()?);
    }
    Ok(statements)
}

struct Parser {
    tokens: Vec<Placed>,
    at: usize,
    nesting: u32,
}

type Parsed<T> = Result<T, PacError>;

impl Parser {
    fn placed(&self) -> &Placed {
        // The last token is the end, and nobody goes beyond it.
        &self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn peek(&self) -> &Token {
        &self.placed().token
    }

    fn line(&self) -> u32 {
        self.placed().line
    }

    fn advance(&mut self) -> Token {
        let token = self.peek().clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        token
    }

    fn error<T>(&self, reason: impl Into<String>) -> Parsed<T> {
        Err(PacError::new(self.line(), reason))
    }

    fn is_mark(&self, mark: &str) -> bool {
        matches!(self.peek(), Token::Mark(found) if *found == mark)
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Token::Word(found) if found == word)
    }

    fn take_mark(&mut self, mark: &str) -> bool {
        let found = self.is_mark(mark);
        if found {
            self.advance();
        }
        found
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.advance();
        }
        found
    }

    fn expect(&mut self, mark: &str) -> Parsed<()> {
        if self.take_mark(mark) { Ok(()) } else { self.error(format!("expected '{mark}'")) }
    }

    fn name(&mut self) -> Parsed<String> {
        match self.advance() {
            Token::Word(word) if !is_reserved(&word) => Ok(word),
            _ => self.error("expected a name"),
        }
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return self.error("nested too deeply");
        }
        let parsed = parse(self);
        self.nesting -= 1;
        parsed
    }

    fn end_of_statement(&mut self) -> Parsed<()> {
        if self.take_mark(";")
            || self.is_mark("}")
            || *self.peek() == Token::End
            || self.placed().after_newline
        {
            Ok(())
        } else {
            self.error("expected ';'")
        }
    }

    fn statement(&mut self) -> Parsed<Statement> {
        self.nested(Self::any_statement)
    }

    fn any_statement(&mut self) -> Parsed<Statement> {
        if self.is_mark("{") {
            return Ok(Statement::Block(self.block()?));
        }
        if self.take_mark(";") {
            return Ok(Statement::Block(Vec::new()));
        }
        let Token::Word(word) = self.peek().clone() else { return self.expression_statement() };
        match word.as_str() {
            "var" | "let" | "const" => {
                let variables = self.variables()?;
                self.end_of_statement()?;
                Ok(variables)
            }
            "function" => {
                let function = self.function()?;
                if function.name.is_none() {
                    return self.error("function without a name");
                }
                Ok(Statement::Function(function))
            }
            "return" => {
                self.advance();
                let ends = self.is_mark(";")
                    || self.is_mark("}")
                    || self.placed().after_newline
                    || *self.peek() == Token::End;
                let value = if ends { None } else { Some(self.expression()?) };
                self.end_of_statement()?;
                Ok(Statement::Return(value))
            }
            "if" => {
                self.advance();
                let condition = self.condition()?;
                let then = Box::new(self.statement()?);
                let otherwise = if self.take_word("else") { Some(Box::new(self.statement()?)) } else { None };
                Ok(Statement::If(condition, then, otherwise))
            }
            "for" => self.for_statement(),
            "while" => {
                self.advance();
                let condition = self.condition()?;
                Ok(Statement::While(condition, Box::new(self.statement()?)))
            }
            "do" => {
                self.advance();
                let body = Box::new(self.statement()?);
                if !self.take_word("while") {
                    return self.error("expected 'while'");
                }
                let condition = self.condition()?;
                self.take_mark(";");
                Ok(Statement::DoWhile(body, condition))
            }
            "switch" => self.switch(),
            "try" => self.try_statement(),
            "throw" => {
                self.advance();
                let value = self.expression()?;
                self.end_of_statement()?;
                Ok(Statement::Throw(value))
            }
            "break" | "continue" => {
                self.advance();
                self.end_of_statement()?;
                Ok(if word == "break" { Statement::Break } else { Statement::Continue })
            }
            "with" | "class" | "import" | "export" => self.error(format!("'{word}' is not supported")),
            _ => self.expression_statement(),
        }
    }

    fn expression_statement(&mut self) -> Parsed<Statement> {
        let expression = self.expression()?;
        self.end_of_statement()?;
        Ok(Statement::Expression(expression))
    }

    fn block(&mut self) -> Parsed<Vec<Statement>> {
        self.expect("{")?;
        let mut statements = Vec::new();
        while !self.take_mark("}") {
            if *self.peek() == Token::End {
                return self.error("block without end");
            }
            statements.push(self.statement()?);
        }
        Ok(statements)
    }

    fn condition(&mut self) -> Parsed<Expression> {
        self.expect("(")?;
        let condition = self.expression()?;
        self.expect(")")?;
        Ok(condition)
    }

    fn variables(&mut self) -> Parsed<Statement> {
        self.advance();
        let mut variables = Vec::new();
        loop {
            let name = self.name()?;
            let value = if self.take_mark("=") { Some(self.assignment()?) } else { None };
            variables.push((name, value));
            if !self.take_mark(",") {
                return Ok(Statement::Variables(variables));
            }
        }
    }

    fn function(&mut self) -> Parsed<Rc<Function>> {
        let line = self.line();
        self.advance();
        let name = if self.is_mark("(") { None } else { Some(self.name()?) };
        self.expect("(")?;
        let mut parameters = Vec::new();
        while !self.take_mark(")") {
            parameters.push(self.name()?);
            if !self.is_mark(")") {
                self.expect(",")?;
            }
        }
        let body = self.nested(Self::block)?;
        Ok(Rc::new(Function { name, parameters, body, line }))
    }

    fn for_statement(&mut self) -> Parsed<Statement> {
        self.advance();
        self.expect("(")?;
        let start = if self.is_mark(";") {
            None
        } else if self.is_word("var") || self.is_word("let") || self.is_word("const") {
            let variables = self.variables()?;
            if self.take_word("in") || self.take_word("of") {
                return match variables {
                    Statement::Variables(mut list) if list.len() == 1 && list[0].1.is_none() => {
                        self.for_in(list.remove(0).0)
                    }
                    _ => self.error("expected one variable before 'in'"),
                };
            }
            Some(Box::new(variables))
        } else {
            let before = self.at;
            if let Token::Word(name) = self.advance()
                && self.take_word("in")
            {
                return self.for_in(name);
            }
            self.at = before;
            Some(Box::new(Statement::Expression(self.expression()?)))
        };
        self.expect(";")?;
        let condition = if self.is_mark(";") { None } else { Some(self.expression()?) };
        self.expect(";")?;
        let step = if self.is_mark(")") { None } else { Some(self.expression()?) };
        self.expect(")")?;
        Ok(Statement::For(start, condition, step, Box::new(self.statement()?)))
    }

    /// What follows `for (NAME in` or `for (NAME of`. Both walk over what PAC files mean: keys of objects and lists.
    fn for_in(&mut self, name: String) -> Parsed<Statement> {
        let is_of = self.at > 0
            && matches!(self.tokens.get(self.at - 1).map(|placed| &placed.token), Some(Token::Word(word)) if word == "of");
        let over = self.expression()?;
        self.expect(")")?;
        let body = Box::new(self.statement()?);
        if is_of {
            return self.error("'for … of' is not supported");
        }
        Ok(Statement::ForIn(name, over, body))
    }

    fn switch(&mut self) -> Parsed<Statement> {
        self.advance();
        let value = self.condition()?;
        self.expect("{")?;
        let mut cases = Vec::new();
        while !self.take_mark("}") {
            let label = if self.take_word("default") {
                None
            } else if self.take_word("case") {
                Some(self.expression()?)
            } else {
                return self.error("expected 'case'");
            };
            self.expect(":")?;
            let mut body = Vec::new();
            while !self.is_word("case") && !self.is_word("default") && !self.is_mark("}") {
                body.push(self.statement()?);
            }
            cases.push((label, body));
        }
        Ok(Statement::Switch(value, cases))
    }

    fn try_statement(&mut self) -> Parsed<Statement> {
        self.advance();
        let body = self.block()?;
        let mut handler = None;
        if self.take_word("catch") {
            let mut name = String::new();
            if self.take_mark("(") {
                name = self.name()?;
                self.expect(")")?;
            }
            handler = Some((name, self.block()?));
        }
        let last = if self.take_word("finally") { self.block()? } else { Vec::new() };
        Ok(Statement::Try(body, handler, last))
    }

    fn expression(&mut self) -> Parsed<Expression> {
        let line = self.line();
        let first = self.assignment()?;
        if !self.is_mark(",") {
            return Ok(first);
        }
        let mut values = vec![first];
        while self.take_mark(",") {
            values.push(self.assignment()?);
        }
        Ok(Expression { kind: Kind::Sequence(values), line })
    }

    fn assignment(&mut self) -> Parsed<Expression> {
        self.nested(|parser| {
            let line = parser.line();
            let target = parser.conditional()?;
            let Token::Mark(mark) = parser.peek() else { return Ok(target) };
            let operator = match *mark {
                "=" => "",
                "+=" => "+",
                "-=" => "-",
                "*=" => "*",
                "/=" => "/",
                "%=" => "%",
                "&=" => "&",
                "|=" => "|",
                "^=" => "^",
                "<<=" => "<<",
                ">>=" => ">>",
                ">>>=" => ">>>",
                _ => return Ok(target),
            };
            if !matches!(target.kind, Kind::Name(_) | Kind::Member(..)) {
                return parser.error("cannot assign to this");
            }
            parser.advance();
            let value = Box::new(parser.assignment()?);
            Ok(Expression { kind: Kind::Assign(operator, Box::new(target), value), line })
        })
    }

    fn conditional(&mut self) -> Parsed<Expression> {
        let line = self.line();
        let condition = self.or()?;
        if !self.take_mark("?") {
            return Ok(condition);
        }
        let then = Box::new(self.assignment()?);
        self.expect(":")?;
        let otherwise = Box::new(self.assignment()?);
        Ok(Expression { kind: Kind::Conditional(Box::new(condition), then, otherwise), line })
    }

    fn or(&mut self) -> Parsed<Expression> {
        self.list("||", Self::and, Kind::Or)
    }

    fn and(&mut self) -> Parsed<Expression> {
        self.list("&&", |parser| parser.chain(0), Kind::And)
    }

    fn list(
        &mut self,
        mark: &str,
        operand: impl Fn(&mut Self) -> Parsed<Expression>,
        join: impl FnOnce(Vec<Expression>) -> Kind,
    ) -> Parsed<Expression> {
        let line = self.line();
        let first = operand(self)?;
        if !self.is_mark(mark) {
            return Ok(first);
        }
        let mut operands = vec![first];
        while self.take_mark(mark) {
            operands.push(operand(self)?);
        }
        Ok(Expression { kind: join(operands), line })
    }

    fn chain(&mut self, level: usize) -> Parsed<Expression> {
        /// Weakest first.
        const LEVELS: [&[&str]; 8] = [
            &["|"],
            &["^"],
            &["&"],
            &["==", "!=", "===", "!=="],
            &["<", ">", "<=", ">="],
            &["<<", ">>", ">>>"],
            &["+", "-"],
            &["*", "/", "%"],
        ];
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let line = self.line();
        let first = self.chain(level + 1)?;
        let mut rest = Vec::new();
        while let Token::Mark(mark) = self.peek() {
            let mark = *mark;
            if !operators.contains(&mark) {
                break;
            }
            self.advance();
            rest.push((mark, self.chain(level + 1)?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        Ok(Expression { kind: Kind::Chain(Box::new(first), rest), line })
    }

    fn unary(&mut self) -> Parsed<Expression> {
        let line = self.line();
        let operator = match self.peek() {
            Token::Mark(mark @ ("!" | "-" | "+" | "~" | "++" | "--")) => *mark,
            Token::Word(word) if word == "typeof" => "typeof",
            Token::Word(word) if word == "void" => "void",
            _ => return self.postfix(),
        };
        self.advance();
        let operand = Box::new(self.nested(Self::unary)?);
        let kind = match operator {
            "++" => Kind::Step(1.0, false, operand),
            "--" => Kind::Step(-1.0, false, operand),
            "typeof" => Kind::TypeOf(operand),
            other => Kind::Unary(other, operand),
        };
        Ok(Expression { kind, line })
    }

    fn postfix(&mut self) -> Parsed<Expression> {
        let line = self.line();
        let operand = self.call()?;
        for (mark, change) in [("++", 1.0), ("--", -1.0)] {
            if self.is_mark(mark) && !self.placed().after_newline {
                self.advance();
                return Ok(Expression { kind: Kind::Step(change, true, Box::new(operand)), line });
            }
        }
        Ok(operand)
    }

    fn call(&mut self) -> Parsed<Expression> {
        /// Longest chain of calls and members, which nests.
        const MAX_CHAIN: usize = 50;
        let mut value = self.primary()?;
        for _ in 0..MAX_CHAIN {
            let line = self.line();
            let kind = if self.take_mark(".") {
                match self.advance() {
                    Token::Word(name) => {
                        let name = Expression { kind: Kind::Text(name.into()), line };
                        Kind::Member(Box::new(value), Box::new(name))
                    }
                    _ => return self.error("expected a name after '.'"),
                }
            } else if self.take_mark("[") {
                let index = self.expression()?;
                self.expect("]")?;
                Kind::Member(Box::new(value), Box::new(index))
            } else if self.is_mark("(") {
                Kind::Call(Box::new(value), self.arguments()?)
            } else {
                return Ok(value);
            };
            value = Expression { kind, line };
        }
        self.error("too many calls in a row")
    }

    fn arguments(&mut self) -> Parsed<Vec<Expression>> {
        self.expect("(")?;
        let mut arguments = Vec::new();
        while !self.take_mark(")") {
            arguments.push(self.assignment()?);
            if !self.is_mark(")") {
                self.expect(",")?;
            }
        }
        Ok(arguments)
    }

    fn primary(&mut self) -> Parsed<Expression> {
        let line = self.line();
        if self.is_word("function") {
            return Ok(Expression { kind: Kind::Function(self.function()?), line });
        }
        let kind = match self.advance() {
            Token::Number(value) => Kind::Number(value),
            Token::Text(value) => Kind::Text(value.into()),
            Token::Regex(pattern, flags) => Kind::Regex(pattern, flags),
            Token::Mark("(") => {
                let inner = self.expression()?;
                self.expect(")")?;
                return Ok(inner);
            }
            Token::Mark("[") => {
                let mut items = Vec::new();
                while !self.take_mark("]") {
                    items.push(self.assignment()?);
                    if !self.is_mark("]") {
                        self.expect(",")?;
                    }
                }
                Kind::List(items)
            }
            Token::Mark("{") => Kind::Object(self.properties()?),
            Token::Word(word) => match word.as_str() {
                "true" => Kind::Boolean(true),
                "false" => Kind::Boolean(false),
                "null" => Kind::Null,
                "undefined" => Kind::Undefined,
                "new" => {
                    let made = Box::new(self.primary()?);
                    let arguments = if self.is_mark("(") { self.arguments()? } else { Vec::new() };
                    Kind::New(made, arguments)
                }
                word if is_reserved(word) => return self.error(format!("'{word}' is not expected here")),
                _ => Kind::Name(word),
            },
            _ => return self.error("expected a value"),
        };
        Ok(Expression { kind, line })
    }

    fn properties(&mut self) -> Parsed<Vec<(String, Expression)>> {
        let mut properties = Vec::new();
        while !self.take_mark("}") {
            let key = match self.advance() {
                Token::Word(key) | Token::Text(key) => key,
                Token::Number(key) => key.to_string(),
                _ => return self.error("expected the name of a property"),
            };
            self.expect(":")?;
            properties.push((key, self.assignment()?));
            if !self.is_mark("}") {
                self.expect(",")?;
            }
        }
        Ok(properties)
    }
}

fn is_reserved(word: &str) -> bool {
    const RESERVED: [&str; 28] = [
        "break",
        "case",
        "catch",
        "class",
        "const",
        "continue",
        "default",
        "delete",
        "do",
        "else",
        "export",
        "finally",
        "for",
        "function",
        "if",
        "import",
        "in",
        "instanceof",
        "new",
        "return",
        "switch",
        "this",
        "throw",
        "try",
        "typeof",
        "var",
        "while",
        "with",
    ];
    RESERVED.contains(&word)
}

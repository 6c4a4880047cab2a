//! Runs the tree, as long as the fuel lasts.

use std::collections::HashMap;
use std::rc::Rc;

use regex_automata::meta::Regex;

use super::functions;
use super::parser::{Expression, Function, Kind, Statement};
use super::value::{Value, bits, show_number};
use super::{PacError, Surroundings};

/// What one run may cost: a step costs one, a byte of a new string and an element of a list one as well. It takes a
/// second at most and bounds the memory.
const FUEL: u64 = 5_000_000;
/// Deepest nesting of expressions, statements and calls at run time; it bounds the stack.
const MAX_DEPTH: u32 = 250;
/// Most elements of one list, so that an index far out costs nothing.
const MAX_LIST: usize = 100_000;
/// Name look-ups of one run: each may take as long as a name server does.
const MAX_LOOKUPS: u32 = 32;
/// Largest compiled regular expression.
const MAX_REGEX: usize = 256 * 1024;

/// Runs the file, then its `FindProxyForURL`.
pub(super) fn run(
    program: &[Statement],
    url: &str,
    host: &str,
    surroundings: &dyn Surroundings,
) -> Result<String, PacError> {
    let mut machine = Machine {
        surroundings,
        fuel: FUEL,
        depth: 0,
        lookups: MAX_LOOKUPS,
        line: 0,
        scopes: vec![Scope { names: HashMap::new(), above: None }],
        lists: Vec::new(),
        objects: Vec::new(),
        closures: Vec::new(),
    };
    machine.hoist(program, 0)?;
    let finish = |machine: &mut Machine<'_>| -> Result<String, Stop> {
        for statement in program {
            machine.execute(statement, 0)?;
        }
        let function = machine.look_up("FindProxyForURL", 0);
        let Some(function @ Value::Closure(_)) = function else {
            return Err(machine.fault("there is no function FindProxyForURL"));
        };
        let answer = machine.call(&function, &[Value::text(url), Value::text(host)])?;
        machine.show(&answer)
    };
    match finish(&mut machine) {
        Ok(answer) => Ok(answer),
        Err(Stop::Fault(error)) => Err(error),
        Err(Stop::Thrown(value)) => {
            let text = machine.show(&value).unwrap_or_default();
            Err(PacError::new(
                machine.line,
                format!("exception: {}", text.chars().take(100).collect::<String>()),
            ))
        }
    }
}

/// Why a run does not go on.
pub(super) enum Stop {
    /// The file is wrong, or costs too much.
    Fault(PacError),
    /// It threw an exception.
    Thrown(Value),
}

/// How a statement ended.
enum Flow {
    Normal,
    Break,
    Continue,
    Return(Value),
}

struct Scope {
    names: HashMap<String, Value>,
    above: Option<usize>,
}

struct Closure {
    function: Rc<Function>,
    scope: usize,
}

pub(super) struct Machine<'a> {
    pub(super) surroundings: &'a dyn Surroundings,
    fuel: u64,
    depth: u32,
    lookups: u32,
    line: u32,
    scopes: Vec<Scope>,
    pub(super) lists: Vec<Vec<Value>>,
    objects: Vec<HashMap<String, Value>>,
    closures: Vec<Closure>,
}

type Run<T> = Result<T, Stop>;

impl Machine<'_> {
    /// An error at the present line.
    pub(super) fn fault(&self, reason: impl Into<String>) -> Stop {
        Stop::Fault(PacError::new(self.line, reason))
    }

    /// Pays for work.
    pub(super) fn pay(&mut self, cost: usize) -> Run<()> {
        match self.fuel.checked_sub(cost as u64) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => Err(self.fault("the file takes too long")),
        }
    }

    /// A new string.
    pub(super) fn new_text(&mut self, text: String) -> Run<Value> {
        self.pay(text.len() + 16)?;
        Ok(Value::Text(text.into()))
    }

    /// A new list.
    pub(super) fn new_list(&mut self, items: Vec<Value>) -> Run<Value> {
        self.pay(16 * (items.len() + 4))?;
        self.lists.push(items);
        Ok(Value::List(self.lists.len() - 1))
    }

    /// The addresses of a name.
    pub(super) fn resolve(&mut self, name: &str) -> Run<Vec<std::net::IpAddr>> {
        self.lookups = match self.lookups.checked_sub(1) {
            Some(left) => left,
            None => return Err(self.fault(format!("more than {MAX_LOOKUPS} name look-ups"))),
        };
        Ok(self.surroundings.resolve(name))
    }

    /// A compiled regular expression.
    pub(super) fn regex(&mut self, pattern: &str, flags: &str) -> Run<Value> {
        self.pay(1000 + 100 * pattern.len())?;
        let syntax = regex_automata::util::syntax::Config::new()
            .case_insensitive(flags.contains('i'))
            .multi_line(flags.contains('m'))
            .unicode(false)
            .utf8(false)
            .nest_limit(50);
        let config = Regex::config().nfa_size_limit(Some(MAX_REGEX)).onepass(false).dfa(false).hybrid(false);
        let built = Regex::builder().syntax(syntax).configure(config).build(pattern);
        match built {
            Ok(regex) => Ok(Value::Regex(Rc::new(regex))),
            Err(_) => Err(self.fault("the regular expression is not supported")),
        }
    }

    fn nested<T>(&mut self, line: u32, work: impl FnOnce(&mut Self) -> Run<T>) -> Run<T> {
        self.pay(1)?;
        if line > 0 {
            self.line = line;
        }
        if self.depth >= MAX_DEPTH {
            return Err(self.fault("nested too deeply"));
        }
        self.depth += 1;
        let outcome = work(self);
        self.depth -= 1;
        outcome
    }

    /// Functions and variables exist from the beginning of their function.
    fn hoist(&mut self, statements: &[Statement], scope: usize) -> Result<(), PacError> {
        for statement in statements {
            match statement {
                Statement::Function(function) => {
                    let closure = self.closure(function, scope);
                    let name = function.name.clone().unwrap_or_default();
                    self.scopes[scope].names.insert(name, closure);
                }
                Statement::Block(inner) => self.hoist(inner, scope)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn closure(&mut self, function: &Rc<Function>, scope: usize) -> Value {
        self.closures.push(Closure { function: Rc::clone(function), scope });
        Value::Closure(self.closures.len() - 1)
    }

    fn look_up(&self, name: &str, scope: usize) -> Option<Value> {
        let mut at = Some(scope);
        while let Some(index) = at {
            let scope = self.scopes.get(index)?;
            if let Some(value) = scope.names.get(name) {
                return Some(value.clone());
            }
            at = scope.above;
        }
        functions::global(name)
    }

    fn assign_name(&mut self, name: &str, value: Value, scope: usize) -> Run<()> {
        self.pay(1)?;
        let mut at = scope;
        loop {
            let Some(found) = self.scopes.get_mut(at) else { return Ok(()) };
            if let Some(place) = found.names.get_mut(name) {
                *place = value;
                return Ok(());
            }
            match found.above {
                Some(above) => at = above,
                None => {
                    found.names.insert(name.to_owned(), value);
                    return self.pay(name.len() + 64);
                }
            }
        }
    }

    /// Calls a function.
    pub(super) fn call(&mut self, function: &Value, arguments: &[Value]) -> Run<Value> {
        match function {
            Value::Closure(index) => {
                let Some(closure) = self.closures.get(*index) else { return Ok(Value::Undefined) };
                let (function, above) = (Rc::clone(&closure.function), closure.scope);
                self.pay(64 * (function.parameters.len() + 2))?;
                let mut names = HashMap::new();
                for (index, name) in function.parameters.iter().enumerate() {
                    names.insert(name.clone(), arguments.get(index).cloned().unwrap_or(Value::Undefined));
                }
                self.scopes.push(Scope { names, above: Some(above) });
                let scope = self.scopes.len() - 1;
                let closures = self.closures.len();
                self.nested(function.line, |machine| {
                    machine.hoist(&function.body, scope).map_err(Stop::Fault)?;
                    let outcome = machine.block(&function.body, scope);
                    // A scope that no closure has seen is of no use any more.
                    if machine.closures.len() == closures && scope + 1 == machine.scopes.len() {
                        machine.scopes.truncate(scope);
                    }
                    match outcome? {
                        Flow::Return(value) => Ok(value),
                        _ => Ok(Value::Undefined),
                    }
                })
            }
            Value::Builtin(name) => functions::call(self, name, arguments),
            _ => Err(self.fault("this is no function")),
        }
    }

    fn block(&mut self, statements: &[Statement], scope: usize) -> Run<Flow> {
        for statement in statements {
            match self.execute(statement, scope)? {
                Flow::Normal => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Normal)
    }

    fn execute(&mut self, statement: &Statement, scope: usize) -> Run<Flow> {
        self.nested(0, |machine| machine.execute_nested(statement, scope))
    }

    fn execute_nested(&mut self, statement: &Statement, scope: usize) -> Run<Flow> {
        match statement {
            Statement::Expression(expression) => {
                self.evaluate(expression, scope)?;
            }
            Statement::Variables(variables) => {
                for (name, value) in variables {
                    let known = self.scopes[scope].names.contains_key(name);
                    let value = match value {
                        Some(value) => self.evaluate(value, scope)?,
                        None if known => continue,
                        None => Value::Undefined,
                    };
                    self.pay(name.len() + 64)?;
                    self.scopes[scope].names.insert(name.clone(), value);
                }
            }
            // It exists already.
            Statement::Function(_) => {}
            Statement::Return(value) => {
                return Ok(Flow::Return(match value {
                    Some(value) => self.evaluate(value, scope)?,
                    None => Value::Undefined,
                }));
            }
            Statement::If(condition, then, otherwise) => {
                if self.evaluate(condition, scope)?.truth() {
                    return self.execute(then, scope);
                }
                if let Some(otherwise) = otherwise {
                    return self.execute(otherwise, scope);
                }
            }
            Statement::For(start, condition, step, body) => {
                if let Some(start) = start {
                    self.execute(start, scope)?;
                }
                loop {
                    if let Some(condition) = condition
                        && !self.evaluate(condition, scope)?.truth()
                    {
                        break;
                    }
                    match self.execute(body, scope)? {
                        Flow::Break => break,
                        Flow::Return(value) => return Ok(Flow::Return(value)),
                        Flow::Normal | Flow::Continue => {}
                    }
                    if let Some(step) = step {
                        self.evaluate(step, scope)?;
                    }
                }
            }
            Statement::ForIn(name, over, body) => return self.for_in(name, over, body, scope),
            Statement::While(condition, body) => {
                while self.evaluate(condition, scope)?.truth() {
                    match self.execute(body, scope)? {
                        Flow::Break => break,
                        Flow::Return(value) => return Ok(Flow::Return(value)),
                        Flow::Normal | Flow::Continue => {}
                    }
                }
            }
            Statement::DoWhile(body, condition) => loop {
                match self.execute(body, scope)? {
                    Flow::Break => break,
                    Flow::Return(value) => return Ok(Flow::Return(value)),
                    Flow::Normal | Flow::Continue => {}
                }
                if !self.evaluate(condition, scope)?.truth() {
                    break;
                }
            },
            Statement::Switch(value, cases) => return self.switch(value, cases, scope),
            Statement::Try(body, handler, last) => {
                let mut outcome = self.block(body, scope);
                if let (Err(Stop::Thrown(value)), Some((name, handler))) = (&outcome, handler) {
                    let value = value.clone();
                    self.assign_name(name, value, scope)?;
                    outcome = self.block(handler, scope);
                }
                if matches!(outcome, Err(Stop::Fault(_))) {
                    return outcome;
                }
                match self.block(last, scope)? {
                    Flow::Normal => return outcome,
                    other => return Ok(other),
                }
            }
            Statement::Throw(value) => {
                let value = self.evaluate(value, scope)?;
                return Err(Stop::Thrown(value));
            }
            Statement::Block(statements) => return self.block(statements, scope),
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Normal)
    }

    fn for_in(&mut self, name: &str, over: &Expression, body: &Statement, scope: usize) -> Run<Flow> {
        let keys: Vec<String> = match self.evaluate(over, scope)? {
            Value::List(index) => (0..self.lists[index].len()).map(|index| index.to_string()).collect(),
            Value::Object(index) => {
                let mut keys: Vec<String> = self.objects[index].keys().cloned().collect();
                keys.sort();
                keys
            }
            _ => Vec::new(),
        };
        for key in keys {
            let key = self.new_text(key)?;
            self.assign_name(name, key, scope)?;
            match self.execute(body, scope)? {
                Flow::Break => break,
                Flow::Return(value) => return Ok(Flow::Return(value)),
                Flow::Normal | Flow::Continue => {}
            }
        }
        Ok(Flow::Normal)
    }

    fn switch(
        &mut self,
        value: &Expression,
        cases: &[(Option<Expression>, Vec<Statement>)],
        scope: usize,
    ) -> Run<Flow> {
        let value = self.evaluate(value, scope)?;
        let mut chosen = None;
        for (index, (label, _)) in cases.iter().enumerate() {
            if let Some(label) = label
                && self.evaluate(label, scope)?.is_identical(&value)
            {
                chosen = Some(index);
                break;
            }
        }
        let start = chosen.or_else(|| cases.iter().position(|(label, _)| label.is_none()));
        for (_, body) in cases.iter().skip(start.unwrap_or(cases.len())) {
            match self.block(body, scope)? {
                Flow::Normal => {}
                Flow::Break => break,
                other => return Ok(other),
            }
        }
        Ok(Flow::Normal)
    }

    fn evaluate(&mut self, expression: &Expression, scope: usize) -> Run<Value> {
        self.nested(expression.line, |machine| machine.evaluate_nested(expression, scope))
    }

    fn evaluate_all(&mut self, expressions: &[Expression], scope: usize) -> Run<Vec<Value>> {
        expressions.iter().map(|expression| self.evaluate(expression, scope)).collect()
    }

    fn evaluate_nested(&mut self, expression: &Expression, scope: usize) -> Run<Value> {
        Ok(match &expression.kind {
            Kind::Number(value) => Value::Number(*value),
            Kind::Text(value) => Value::Text(Rc::clone(value)),
            Kind::Boolean(value) => Value::Boolean(*value),
            Kind::Null => Value::Null,
            Kind::Undefined => Value::Undefined,
            Kind::Name(name) => match self.look_up(name, scope) {
                Some(value) => value,
                None => return Err(self.fault(format!("'{name}' is not defined"))),
            },
            Kind::Regex(pattern, flags) => self.regex(pattern, flags)?,
            Kind::List(items) => {
                let items = self.evaluate_all(items, scope)?;
                self.new_list(items)?
            }
            Kind::Object(properties) => {
                let mut object = HashMap::new();
                for (key, value) in properties {
                    self.pay(key.len() + 64)?;
                    object.insert(key.clone(), self.evaluate(value, scope)?);
                }
                self.objects.push(object);
                Value::Object(self.objects.len() - 1)
            }
            Kind::Function(function) => self.closure(function, scope),
            Kind::Chain(first, rest) => {
                let mut value = self.evaluate(first, scope)?;
                for (operator, operand) in rest {
                    let operand = self.evaluate(operand, scope)?;
                    value = self.operate(operator, &value, &operand)?;
                }
                value
            }
            Kind::And(operands) => self.first_that(operands, scope, false)?,
            Kind::Or(operands) => self.first_that(operands, scope, true)?,
            Kind::Unary(operator, operand) => {
                let operand = self.evaluate(operand, scope)?;
                match *operator {
                    "!" => Value::Boolean(!operand.truth()),
                    "-" => Value::Number(-self.number(&operand)?),
                    "+" => Value::Number(self.number(&operand)?),
                    "~" => Value::Number(f64::from(!bits(self.number(&operand)?) as i32)),
                    _ => Value::Undefined,
                }
            }
            Kind::TypeOf(operand) => match &operand.kind {
                Kind::Name(name) if self.look_up(name, scope).is_none() => Value::text("undefined"),
                _ => Value::text(self.evaluate(operand, scope)?.kind()),
            },
            Kind::Step(change, old_counts, target) => {
                let before = self.evaluate(target, scope)?;
                let before = self.number(&before)?;
                let after = before + change;
                self.assign(target, Value::Number(after), scope)?;
                Value::Number(if *old_counts { before } else { after })
            }
            Kind::Conditional(condition, then, otherwise) => {
                let chosen = if self.evaluate(condition, scope)?.truth() { then } else { otherwise };
                self.evaluate(chosen, scope)?
            }
            Kind::Assign(operator, target, value) => {
                let value = if operator.is_empty() {
                    self.evaluate(value, scope)?
                } else {
                    let before = self.evaluate(target, scope)?;
                    let value = self.evaluate(value, scope)?;
                    self.operate(operator, &before, &value)?
                };
                self.assign(target, value.clone(), scope)?;
                value
            }
            Kind::Member(object, key) => {
                let object = self.evaluate(object, scope)?;
                let key = self.evaluate(key, scope)?;
                self.member(&object, &key)?
            }
            Kind::Call(function, arguments) => {
                if let Kind::Member(object, key) = &function.kind {
                    let object = self.evaluate(object, scope)?;
                    let key = self.evaluate(key, scope)?;
                    let arguments = self.evaluate_all(arguments, scope)?;
                    return self.call_method(&object, &key, &arguments);
                }
                let function = self.evaluate(function, scope)?;
                let arguments = self.evaluate_all(arguments, scope)?;
                self.call(&function, &arguments)?
            }
            Kind::New(made, arguments) => {
                let arguments = self.evaluate_all(arguments, scope)?;
                match &made.kind {
                    Kind::Name(name) if name == "Array" => match arguments.as_slice() {
                        [Value::Number(_)] => self.new_list(Vec::new())?,
                        _ => self.new_list(arguments)?,
                    },
                    Kind::Name(name) if name == "Object" => {
                        self.pay(64)?;
                        self.objects.push(HashMap::new());
                        Value::Object(self.objects.len() - 1)
                    }
                    Kind::Name(name) if name == "RegExp" => {
                        let mut texts = Vec::new();
                        for argument in &arguments {
                            texts.push(self.show(argument)?);
                        }
                        let pattern = texts.first().cloned().unwrap_or_default();
                        self.regex(&pattern, texts.get(1).map_or("", String::as_str))?
                    }
                    _ => return Err(self.fault("'new' is supported for Array, Object and RegExp only")),
                }
            }
            Kind::Sequence(values) => self.evaluate_all(values, scope)?.pop().unwrap_or(Value::Undefined),
        })
    }

    /// The first operand whose truth is `wanted`, or the last one.
    fn first_that(&mut self, operands: &[Expression], scope: usize, wanted: bool) -> Run<Value> {
        let mut value = Value::Undefined;
        for operand in operands {
            value = self.evaluate(operand, scope)?;
            if value.truth() == wanted {
                break;
            }
        }
        Ok(value)
    }

    fn assign(&mut self, target: &Expression, value: Value, scope: usize) -> Run<()> {
        match &target.kind {
            Kind::Name(name) => self.assign_name(name, value, scope),
            Kind::Member(object, key) => {
                let object = self.evaluate(object, scope)?;
                let key = self.evaluate(key, scope)?;
                match (object, &key) {
                    (Value::List(list), Value::Number(index)) => {
                        let index = super::value::position(*index, MAX_LIST);
                        if index >= MAX_LIST {
                            return Err(self.fault("the list is too long"));
                        }
                        let missing = (index + 1).saturating_sub(self.lists[list].len());
                        self.pay(16 * missing)?;
                        let list = &mut self.lists[list];
                        list.resize(list.len() + missing, Value::Undefined);
                        list[index] = value;
                        Ok(())
                    }
                    (Value::Object(object), key) => {
                        let key = self.show(key)?;
                        self.pay(key.len() + 64)?;
                        self.objects[object].insert(key, value);
                        Ok(())
                    }
                    _ => Err(self.fault("cannot assign to a property of this")),
                }
            }
            _ => Err(self.fault("cannot assign to this")),
        }
    }

    fn member(&mut self, object: &Value, key: &Value) -> Run<Value> {
        match (object, key) {
            (Value::List(list), Value::Number(index)) if *index >= 0.0 => {
                let list = &self.lists[*list];
                Ok(list.get(super::value::position(*index, list.len())).cloned().unwrap_or(Value::Undefined))
            }
            (Value::Text(text), Value::Number(index)) if *index >= 0.0 => {
                self.pay(text.len())?;
                let letter = text.chars().nth(super::value::position(*index, text.len()));
                Ok(letter.map_or(Value::Undefined, |letter| Value::text(letter.to_string())))
            }
            (Value::Undefined | Value::Null, _) => {
                let key = self.show(key)?;
                Err(self.fault(format!(
                    "'{}' of something that is not there",
                    key.chars().take(50).collect::<String>()
                )))
            }
            _ => {
                let key = self.show(key)?;
                match object {
                    Value::List(list) if key == "length" => Ok(Value::count(self.lists[*list].len())),
                    Value::List(list) => match key.parse::<usize>() {
                        Ok(index) => Ok(self.lists[*list].get(index).cloned().unwrap_or(Value::Undefined)),
                        Err(_) => Ok(Value::Undefined),
                    },
                    Value::Text(text) if key == "length" => {
                        self.pay(text.len())?;
                        Ok(Value::count(text.chars().count()))
                    }
                    Value::Object(object) => {
                        Ok(self.objects[*object].get(&key).cloned().unwrap_or(Value::Undefined))
                    }
                    _ => Ok(Value::Undefined),
                }
            }
        }
    }

    fn call_method(&mut self, object: &Value, key: &Value, arguments: &[Value]) -> Run<Value> {
        let own = match object {
            Value::Object(_) => self.member(object, key)?,
            _ => Value::Undefined,
        };
        if matches!(own, Value::Closure(_) | Value::Builtin(_)) {
            return self.call(&own, arguments);
        }
        let name = self.show(key)?;
        functions::method(self, object, &name, arguments)
    }

    fn operate(&mut self, operator: &str, left: &Value, right: &Value) -> Run<Value> {
        let is_text = |value: &Value| {
            !matches!(value, Value::Undefined | Value::Null | Value::Boolean(_) | Value::Number(_))
        };
        Ok(match operator {
            "+" if is_text(left) || is_text(right) => {
                let (left, right) = (self.show(left)?, self.show(right)?);
                self.pay(left.len() + right.len())?;
                self.new_text(left + &right)?
            }
            "===" => Value::Boolean(left.is_identical(right)),
            "!==" => Value::Boolean(!left.is_identical(right)),
            "==" => Value::Boolean(self.is_equal(left, right)?),
            "!=" => Value::Boolean(!self.is_equal(left, right)?),
            "<" | ">" | "<=" | ">=" => {
                let order = match (left, right) {
                    (Value::Text(left), Value::Text(right)) => {
                        self.pay(left.len().min(right.len()))?;
                        Some(left.cmp(right))
                    }
                    _ => self.number(left)?.partial_cmp(&self.number(right)?),
                };
                Value::Boolean(order.is_some_and(|order| match operator {
                    "<" => order.is_lt(),
                    ">" => order.is_gt(),
                    "<=" => order.is_le(),
                    _ => order.is_ge(),
                }))
            }
            _ => {
                let (left, right) = (self.number(left)?, self.number(right)?);
                let shift = bits(right) & 31;
                Value::Number(match operator {
                    "+" => left + right,
                    "-" => left - right,
                    "*" => left * right,
                    "/" => left / right,
                    "%" => left % right,
                    "&" => f64::from((bits(left) & bits(right)) as i32),
                    "|" => f64::from((bits(left) | bits(right)) as i32),
                    "^" => f64::from((bits(left) ^ bits(right)) as i32),
                    "<<" => f64::from((bits(left) << shift) as i32),
                    ">>" => f64::from((bits(left) as i32) >> shift),
                    ">>>" => f64::from(bits(left) >> shift),
                    _ => return Err(self.fault(format!("operator {operator} is not supported"))),
                })
            }
        })
    }

    fn is_equal(&mut self, left: &Value, right: &Value) -> Run<bool> {
        let absent = |value: &Value| matches!(value, Value::Undefined | Value::Null);
        if absent(left) || absent(right) {
            return Ok(absent(left) && absent(right));
        }
        if let (Value::Text(left), Value::Text(right)) = (left, right) {
            self.pay(left.len().min(right.len()))?;
            return Ok(left == right);
        }
        let simple = |value: &Value| matches!(value, Value::Boolean(_) | Value::Number(_) | Value::Text(_));
        match (simple(left), simple(right)) {
            (true, true) => Ok(self.number(left)? == self.number(right)?),
            (false, false) => Ok(left.is_identical(right)),
            _ => Ok(self.show(left)? == self.show(right)?),
        }
    }

    /// As a number.
    pub(super) fn number(&mut self, value: &Value) -> Run<f64> {
        match value {
            Value::Text(text) => {
                self.pay(text.len())?;
                Ok(value.number())
            }
            Value::List(_) => Ok(super::value::parse_number(&self.show(value)?)),
            other => Ok(other.number()),
        }
    }

    /// As text.
    pub(super) fn show(&mut self, value: &Value) -> Run<String> {
        match value {
            Value::Text(text) => {
                self.pay(text.len())?;
                Ok(text.to_string())
            }
            Value::Undefined => Ok("undefined".to_owned()),
            Value::Null => Ok("null".to_owned()),
            Value::Boolean(value) => Ok(value.to_string()),
            Value::Number(value) => Ok(show_number(*value)),
            Value::List(list) => {
                let items = self.lists[*list].clone();
                self.pay(items.len())?;
                let parts: Run<Vec<String>> = items
                    .iter()
                    .map(|item| match item {
                        Value::Undefined | Value::Null => Ok(String::new()),
                        // A list may contain itself.
                        item => self.nested(0, |machine| machine.show(item)),
                    })
                    .collect();
                let text = parts?.join(",");
                self.pay(text.len())?;
                Ok(text)
            }
            Value::Object(_) => Ok("[object Object]".to_owned()),
            Value::Closure(_) | Value::Builtin(_) => Ok("function".to_owned()),
            Value::Regex(_) => Ok("regular expression".to_owned()),
        }
    }
}

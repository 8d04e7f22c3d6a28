// What Ollama makes of a Modelfile and of chats, by Go's own text/template: `go run ollama_prompts.go < IN > OUT`.
//
// IN is a list of {"modelfile": a text, "chats": [[{"role": ..., "content": ...}]]} as JSON, OUT a list of {"values": [[name, value]],
// "prompts": [{"text": ...} or {"error": ...}]}. The rules are those of github.com/ollama/ollama in August 2026, told anew:
// parser/parser.go (values of a Modelfile), template/template.go (turns of one role are joined; what a template sees).
package main

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type message struct {
	Role, Content, Thinking string
}

type job struct {
	Modelfile string
	Chats     [][]message
}

type prompt struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

type answer struct {
	Values  [][2]string `json:"values"`
	Prompts []prompt    `json:"prompts"`
}

func main() {
	var jobs []job
	check(json.NewDecoder(os.Stdin).Decode(&jobs))
	answers := []answer{}
	for _, one := range jobs {
		answers = append(answers, answer{Values: values(one.Modelfile), Prompts: prompts(one)})
	}
	check(json.NewEncoder(os.Stdout).Encode(answers))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// values are the lines NAME VALUE and PARAMETER NAME VALUE of a Modelfile. A value ends with the first line that closes its quotes;
// nothing in it is an escape, and characters that are not printable are lost.
func values(text string) [][2]string {
	var found [][2]string
	lines := strings.SplitAfter(text, "\n")
	for i := 0; i < len(lines); i++ {
		if line := strings.TrimSpace(lines[i]); line == "" || line[0] == '#' {
			continue
		}
		name, rest, _ := strings.Cut(printable(lines[i]), " ")
		if name == "PARAMETER" {
			name, rest, _ = strings.Cut(rest, " ")
		}
		value, closed := unquoted(rest)
		for !closed && i+1 < len(lines) {
			i++
			rest += printable(lines[i])
			value, closed = unquoted(rest)
		}
		if !closed {
			panic("no end of the value of " + name)
		}
		found = append(found, [2]string{name, value})
	}
	return found
}

func printable(line string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) || strings.ContainsRune("\n\r\t", r) {
			return r
		}
		return -1
	}, line)
}

func unquoted(text string) (string, bool) {
	text = strings.TrimSpace(text)
	for _, quotes := range []string{`"""`, `"`} {
		if strings.HasPrefix(text, quotes) {
			n := len(quotes)
			if len(text) < 2*n || !strings.HasSuffix(text, quotes) {
				return "", false
			}
			return text[n : len(text)-n], true
		}
	}
	return text, true
}

func prompts(one job) []prompt {
	found := []prompt{}
	source := ""
	for _, value := range values(one.Modelfile) {
		if value[0] == "TEMPLATE" {
			source = value[1]
		}
	}
	functions := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) }}
	program, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(source)
	check(err)
	for _, chat := range one.Chats {
		var text strings.Builder
		system, turns := joined(chat)
		err := program.Execute(&text, map[string]any{
			"System": system, "Messages": turns, "Tools": nil, "Response": "", "Think": false, "ThinkLevel": "", "IsThinkSet": false,
		})
		if err != nil {
			found = append(found, prompt{Error: err.Error()})
		} else {
			found = append(found, prompt{Text: text.String()})
		}
	}
	return found
}

// joined has all system texts as one, and the turns, those of one role in a row as one.
func joined(chat []message) (string, []*message) {
	var system []string
	var turns []*message
	for _, turn := range chat {
		if turn.Role == "system" {
			system = append(system, turn.Content)
		}
		if last := len(turns) - 1; last >= 0 && turns[last].Role == turn.Role && turn.Role != "tool" {
			turns[last].Content += "\n\n" + turn.Content
		} else {
			turns = append(turns, &turn)
		}
	}
	return strings.Join(system, "\n\n"), turns
}

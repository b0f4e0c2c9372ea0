package remedy

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Transaction is what a package manager says it would do.
type Transaction struct {
	Install []string `json:"install,omitempty"`
	// Others are what a repair never does: "upgrade of libc6", "removal of x".
	Others []string `json:"others,omitempty"`
}

// Refusal says why a transaction is not let through: it would do more than add
// packages, or something else than what was asked. "" lets it through.
func (t Transaction) Refusal(requested []string) string {
	if len(t.Others) > 0 {
		return "it would not only add packages, but also bring " + fewOf(t.Others) + "; a person has to decide that"
	}
	for _, name := range requested {
		if !slices.Contains(t.Install, name) {
			return fmt.Sprintf("it would not install %s itself: it would install %s", name, orNothing(t.Install))
		}
	}
	return ""
}

func fewOf(list []string) string {
	const few = 8
	if len(list) > few {
		return strings.Join(list[:few], ", ") + fmt.Sprintf(" and %d more", len(list)-few)
	}
	return strings.Join(list, ", ")
}

func orNothing(list []string) string {
	if len(list) == 0 {
		return "nothing"
	}
	return fewOf(list)
}

// errNotUnderstood is what a parser returns for an answer that is not the one it
// knows: what can not be read is not let through.
var errNotUnderstood = errors.New("the dry run's answer was not understood")

// parseSimulation reads a dry run's standard output.
func (m Manager) parseSimulation(out []byte) (Transaction, error) {
	switch m {
	case Apt:
		return parseAptSimulation(out)
	case Zypper, Transactional:
		return parseZypperSimulation(out)
	case Dnf, Yum, Microdnf, Tdnf:
		return parseDnfSimulation(out)
	}
	return Transaction{}, errNotUnderstood
}

// parseAptSimulation reads `apt-get --simulate`: one line an action.
//
//	Inst lsscsi (0.32-1 Debian:13.7/stable [amd64])
//	Inst libc6 [2.41-1] (2.41-2 Debian:13.7/stable [amd64])   an upgrade
//	Remv ntp [1:4.2.8]
//	Conf lsscsi (0.32-1 ...)
func parseAptSimulation(out []byte) (Transaction, error) {
	var t Transaction
	summary := false
	for raw := range bytes.Lines(out) {
		line := strings.TrimRight(string(raw), "\r\n")
		word, rest, _ := strings.Cut(line, " ")
		name, rest, _ := strings.Cut(rest, " ")
		// A foreign architecture is named: "libc6:i386".
		plain, _, _ := strings.Cut(name, ":")
		switch {
		case word == "Inst" && strings.HasPrefix(rest, "["):
			t.Others = append(t.Others, "upgrade of "+name)
		case word == "Inst" && name != "":
			t.Install = append(t.Install, plain)
		case word == "Remv", word == "Purg":
			t.Others = append(t.Others, "removal of "+name)
		case strings.HasPrefix(line, "Note, selecting ") && strings.Contains(line, " for "):
			// A name that no package has is a regular expression to apt.
			t.Others = append(t.Others, "something else than what was named ("+line+")")
		case strings.Contains(line, " upgraded, ") && strings.Contains(line, " newly installed, "):
			summary = true
		}
	}
	if !summary {
		return t, fmt.Errorf("%w: it has no line that sums up", errNotUnderstood)
	}
	return t, nil
}

// parseZypperSimulation reads `zypper --xmlout install --dry-run`
// (zypper-xml.rng): an install-summary with a list for each kind of action.
func parseZypperSimulation(out []byte) (Transaction, error) {
	var t Transaction
	dec := xml.NewDecoder(bytes.NewReader(out))
	list, summary := "", false
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return t, fmt.Errorf("%w: %v", errNotUnderstood, err)
		}
		switch el := token.(type) {
		case xml.StartElement:
			switch {
			case el.Name.Local == "install-summary":
				summary = true
			case strings.HasPrefix(el.Name.Local, "to-"):
				list = strings.TrimPrefix(el.Name.Local, "to-")
			case el.Name.Local == "solvable" && list != "":
				name := attr(el, "name")
				if list == "install" {
					t.Install = append(t.Install, name)
				} else {
					t.Others = append(t.Others, list+" of "+name)
				}
			}
		case xml.EndElement:
			if strings.HasPrefix(el.Name.Local, "to-") {
				list = ""
			}
		}
	}
	if !summary {
		return t, fmt.Errorf("%w: it has no install-summary", errNotUnderstood)
	}
	return t, nil
}

func attr(el xml.StartElement, name string) string {
	for _, a := range el.Attr {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

// parseDnfSimulation reads the table of `dnf install --assumeno`, of dnf5, yum
// and tdnf too: headings that end in a colon, a row a package below each, then
// a count of each kind.
//
//	Installing:
//	 lsscsi        x86_64   0.32-1    baseos   66 k
//	     replacing  old.x86_64 1-1
//	Upgrading:
//	 glibc ...
//	Transaction Summary
//	Install  1 Package
func parseDnfSimulation(out []byte) (Transaction, error) {
	var t Transaction
	heading, table := "", false
	for raw := range bytes.Lines(out) {
		line := strings.TrimRight(string(raw), " \r\n")
		fields := strings.Fields(line)
		indent := len(line) - len(strings.TrimLeft(line, " "))
		switch {
		case len(fields) == 0:
		case strings.HasPrefix(line, "Transaction Summary"), strings.HasPrefix(line, "Total installed size"), strings.HasPrefix(line, "==="):
			heading = ""
		case indent == 0 && strings.HasSuffix(line, ":") && isDnfHeading(fields[0]):
			heading, table = strings.TrimSuffix(line, ":"), true
		case strings.EqualFold(fields[0], "replacing") && indent > 0:
			t.Others = append(t.Others, "removal of "+strings.Join(fields[1:], " "))
		case heading == "":
			if done := dnfCount(fields); done != "" {
				t.Others = append(t.Others, done)
			}
		// A row that was too long for the terminal goes on below, further in.
		case indent > 1:
		case strings.HasPrefix(heading, "Installing"):
			t.Install = append(t.Install, fields[0])
		default:
			t.Others = append(t.Others, strings.ToLower(strings.Fields(heading)[0])+" of "+fields[0])
		}
	}
	if !table {
		return t, fmt.Errorf("%w: it lists no packages", errNotUnderstood)
	}
	return t, nil
}

func isDnfHeading(word string) bool {
	return slices.Contains([]string{"Installing", "Upgrading", "Updating", "Downgrading", "Removing", "Reinstalling", "Obsoleting", "Replacing", "Skipping", "Changing", "Switching", "Enabling", "Disabling"}, strings.TrimSuffix(word, ":"))
}

// dnfCount reads a line of the summary: "Upgrade  2 Packages".
func dnfCount(fields []string) string {
	if len(fields) < 2 {
		return ""
	}
	switch word := strings.TrimSuffix(fields[0], ":"); word {
	case "Upgrade", "Remove", "Downgrade", "Reinstall", "Upgrading", "Removing", "Downgrading", "Replacing":
		return strings.ToLower(word) + " of " + strings.Join(fields[1:], " ")
	}
	return ""
}

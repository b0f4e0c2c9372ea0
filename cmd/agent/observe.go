package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/remedy"
)

// observeVar makes the agent one that only observes. It is no flag, because it must
// hold for the container and not for one command line: the image has no shell, so
// that whoever may exec into the pod can start the agent there, and nothing that
// takes the variable away.
const observeVar = "HOST_HYGIENE_OBSERVE"

// observing reads the value of observeVar. What is neither true nor false is an
// error: a slip must not give back what was to be taken away.
func observing(value string) (bool, error) {
	if value == "" {
		return false, nil
	}
	only, err := strconv.ParseBool(value)
	if err != nil {
		return false, exitError{exitUsage, fmt.Errorf("%s=%q: want true or false", observeVar, value)}
	}
	return only, nil
}

// errObserves is what an agent that only observes answers.
var errObserves = errors.New("this agent only observes (" + observeVar + " is set): it neither plans nor makes repairs")

// refused stands in for the commands of pkg/remedy, which is then reachable from
// no command line.
func refused(commands ...*cobra.Command) []*cobra.Command {
	list := make([]*cobra.Command, len(commands))
	for i, c := range commands {
		list[i] = &cobra.Command{
			Use: c.Use, Short: c.Short, Hidden: true,
			DisableFlagParsing: true, // whatever it is given, the answer is the same
			RunE:               func(*cobra.Command, []string) error { return exitError{exitUsage, errObserves} },
		}
	}
	return list
}

// observer stands where the remedies are in other agents, and says once that the
// config asks for what is not done here.
type observer struct {
	tell func(kind, reason, subject, message string)
	log  *slog.Logger
	told bool
}

// Report implements [engine.Reporter].
func (o *observer) Report(s engine.Snapshot) {
	asked := s.Config.Remedies.Mode == config.ModeEnforce
	if asked && !o.told {
		const why = "remedies.mode is enforce, but this agent only observes: nothing is changed"
		o.log.Error("remedies: " + why)
		o.tell("Warning", remedy.EventNotAllowed, "remedies", why)
	}
	o.told = asked
}

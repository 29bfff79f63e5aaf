package cli

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// envReadOnly refuses every change, as --read-only does.
const envReadOnly = "MONOTEL_READ_ONLY"

// readOnlyBy takes the value of the environment. A flag cannot take it back.
func (c *cli) readOnlyBy(env string) error {
	if env == "" {
		return nil
	}
	on, err := strconv.ParseBool(env)
	if err != nil {
		return fmt.Errorf("%s=%q: want true or false", envReadOnly, env)
	}
	c.readOnly = c.readOnly || on
	return nil
}

// mayChange refuses a command that changes something, before it connects, if nothing
// may be changed.
func (c *cli) mayChange() error {
	if c.readOnly {
		return usagef("nothing may be changed: --read-only or %s is set", envReadOnly)
	}
	return nil
}

// refuseTwice has each flag of a single value refuse to be given twice: the first value
// would be dropped silently.
func refuseTwice(cmd *cobra.Command) {
	refuse := func(f *pflag.Flag) {
		if _, many := f.Value.(pflag.SliceValue); !many {
			f.Value = &singleValue{Value: f.Value}
		}
	}
	cmd.LocalNonPersistentFlags().VisitAll(refuse)
	cmd.PersistentFlags().VisitAll(refuse)
	for _, sub := range cmd.Commands() {
		refuseTwice(sub)
	}
}

// A singleValue is the value of a flag that may be given once.
type singleValue struct {
	pflag.Value

	given bool
}

// Set sets the value, the first time.
func (v *singleValue) Set(s string) error {
	if v.given {
		return errors.New("it is given twice")
	}
	v.given = true
	return v.Value.Set(s)
}

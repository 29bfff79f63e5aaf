package main

import (
	"cmp"
	"fmt"
	"strings"
)

// A shape is the Go type of a family of events. It has the fields that somebody
// needs, and not the hundreds that GitHub sends.
type shape interface {
	// describe says in a line what has happened.
	describe() string
}

// families with more to say than the basic shape. Many families share a shape,
// because their payloads have the same parts.
var shapes = map[string]func(name string) family{
	"check_run":                   newFamily[checkEvent],
	"check_suite":                 newFamily[checkEvent],
	"create":                      newFamily[refEvent],
	"delete":                      newFamily[refEvent],
	"discussion":                  newFamily[discussionEvent],
	"discussion_comment":          newFamily[discussionEvent],
	"issue_comment":               newFamily[issueEvent],
	"issues":                      newFamily[issueEvent],
	"pull_request":                newFamily[pullRequestEvent],
	"pull_request_review":         newFamily[pullRequestEvent],
	"pull_request_review_comment": newFamily[pullRequestEvent],
	"pull_request_review_thread":  newFamily[pullRequestEvent],
	"push":                        newFamily[pushEvent],
	"release":                     newFamily[releaseEvent],
	"status":                      newFamily[statusEvent],
	"workflow_run":                newFamily[checkEvent],
}

// basicEvent is what nearly every payload has, and the whole shape of families
// that have no other.
type basicEvent struct {
	Action     string `json:"action"`
	Repository struct {
		FullName string `json:"full_name"`
	} `json:"repository"`
	Organization struct {
		Login string `json:"login"`
	} `json:"organization"`
	Sender struct {
		Login string `json:"login"`
	} `json:"sender"`
}

func (e basicEvent) describe() string {
	var parts []string
	if e.Action != "" {
		parts = append(parts, quoteOdd(e.Action))
	}
	switch {
	case e.Repository.FullName != "":
		parts = append(parts, "in "+quoteOdd(e.Repository.FullName))
	case e.Organization.Login != "":
		parts = append(parts, "in "+quoteOdd(e.Organization.Login))
	}
	if e.Sender.Login != "" {
		parts = append(parts, "by "+quoteOdd(e.Sender.Login))
	}
	return strings.Join(parts, " ")
}

// quoteOdd quotes what could do more to a terminal than be read.
func quoteOdd(s string) string {
	if q := fmt.Sprintf("%q", s); q != `"`+s+`"` || strings.Contains(s, " ") {
		return q
	}
	return s
}

type titled struct {
	Number int    `json:"number"`
	Title  string `json:"title"`
}

func (t titled) String() string { return fmt.Sprintf("#%d %q", t.Number, t.Title) }

type issueEvent struct {
	basicEvent

	Issue titled `json:"issue"`
	Label struct {
		Name string `json:"name"`
	} `json:"label"`
}

func (e issueEvent) describe() string {
	s := fmt.Sprintf("%s: issue %v", e.basicEvent.describe(), e.Issue)
	if e.Label.Name != "" {
		s += fmt.Sprintf(", label %q", e.Label.Name)
	}
	return s
}

type pullRequestEvent struct {
	basicEvent

	PullRequest titled `json:"pull_request"`
	Review      struct {
		State string `json:"state"`
	} `json:"review"`
}

func (e pullRequestEvent) describe() string {
	s := fmt.Sprintf("%s: pull request %v", e.basicEvent.describe(), e.PullRequest)
	if e.Review.State != "" {
		s += ", review: " + quoteOdd(e.Review.State)
	}
	return s
}

type discussionEvent struct {
	basicEvent

	Discussion titled `json:"discussion"`
}

func (e discussionEvent) describe() string {
	return fmt.Sprintf("%s: discussion %v", e.basicEvent.describe(), e.Discussion)
}

type pushEvent struct {
	basicEvent

	Ref     string `json:"ref"`
	Commits []struct {
		ID string `json:"id"`
	} `json:"commits"`
}

func (e pushEvent) describe() string {
	return fmt.Sprintf("%s: %d commits to %s", e.basicEvent.describe(), len(e.Commits), quoteOdd(e.Ref))
}

type releaseEvent struct {
	basicEvent

	Release struct {
		TagName string `json:"tag_name"`
	} `json:"release"`
}

func (e releaseEvent) describe() string {
	return fmt.Sprintf("%s: release %s", e.basicEvent.describe(), quoteOdd(e.Release.TagName))
}

type refEvent struct {
	basicEvent

	Ref     string `json:"ref"`
	RefType string `json:"ref_type"`
}

func (e refEvent) describe() string {
	return fmt.Sprintf("%s: %s %s", e.basicEvent.describe(), quoteOdd(e.RefType), quoteOdd(e.Ref))
}

type statusEvent struct {
	basicEvent

	Context string `json:"context"`
	State   string `json:"state"`
}

func (e statusEvent) describe() string {
	return fmt.Sprintf("%s: %s is %s", e.basicEvent.describe(), quoteOdd(e.Context), quoteOdd(e.State))
}

// checkEvent has one of three parts, which say the same.
type checkEvent struct {
	basicEvent

	CheckRun    *check `json:"check_run"`
	CheckSuite  *check `json:"check_suite"`
	WorkflowRun *check `json:"workflow_run"`
}

type check struct {
	Name       string `json:"name"` // a check suite has none
	Status     string `json:"status"`
	Conclusion string `json:"conclusion"` // null while it runs
}

func (e checkEvent) describe() string {
	c := cmp.Or(e.CheckRun, e.CheckSuite, e.WorkflowRun)
	if c == nil {
		return e.basicEvent.describe()
	}
	state := quoteOdd(c.Status)
	if c.Conclusion != "" {
		state += ", " + quoteOdd(c.Conclusion)
	}
	if c.Name != "" {
		state = fmt.Sprintf("%q %s", c.Name, state)
	}
	return e.basicEvent.describe() + ": " + state
}

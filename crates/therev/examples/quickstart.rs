//! Connect, register, post, read a page: `cargo run -p therev --example quickstart -- CONTROL_URL`.

use therev::{Actor, Config, NewPost, NewThread, NewUser, ThreadOrder, UserId};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let control = std::env::args().nth(1).ok_or("give the address of the control database")?;
    run(Config::new(control)).await
}

pub(crate) async fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let therev = therev::connect(config).await?;
    let operator = Actor::Operator("quickstart".into());

    // Ids that the caller chooses make every call repeatable.
    let (ada, bob) = (UserId::new(), UserId::new());
    for (id, name) in [(ada, "ada"), (bob, "bob")] {
        let user_name = format!("{name}.{}", &id.to_string()[24..]);
        therev.register(NewUser { user_id: Some(id), user_name, ..NewUser::default() }, &operator).await?;
    }

    let thread = therev.create_thread(NewThread::new(ada, "Which tea?", "I only have coffee.")).await?;
    let advice = therev.create_post(NewPost::new(bob, thread.thread_id, "Then drink coffee.")).await?;
    therev.reply(ada, advice.post_id, "That is what I feared.").await?;

    let page = therev.thread_page(thread.thread_id, None, 50).await?;
    println!("{}", page.thread.title);
    for item in &page.posts {
        println!("  {}: {}", item.author.user_name.as_deref().unwrap_or("?"), item.post.body.as_deref().unwrap_or(""));
    }

    let newest = therev.threads(ThreadOrder::Newest, None, 1, Some(&thread.seen)).await?;
    println!("newest thread: {}", newest.items[0].title);
    Ok(())
}
